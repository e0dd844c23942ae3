"""The index of tar shards: names, members, captions, damage; restart; samples and their order."""

import io
import json
import os
import random
import tarfile

import pytest
from helpers import LFS, encoded, write_shards, write_tar

import shards
from captions import load_captions
from datasets import CaptionDataset
from infra import arrow, tars
from infra.archives import read_file
from preprocessing import Preprocessing
from utils import InputError

JPEG, PNG, WEBP = encoded(0), encoded(1, "PNG"), encoded(2, "WEBP")


def rows_of(metadata, *keys):
    """[(name of the image, its bytes, captions)] of an index."""
    pairs = load_captions("webdataset", metadata, ("", "", *keys))
    found = [pairs[i] for i in range(len(pairs))]
    return [
        (path.partition(".tar/")[2].rpartition("@")[0], read_file(pairs.root, path), texts)
        for path, texts in found
    ]


def test_sources_are_patterns_folders_and_lists(tmp_path):
    write_shards(tmp_path / "a", [1, 1])
    write_shards(tmp_path / "b", [1])
    for other in ("00000.parquet", "notes.json.gz"):
        (tmp_path / "b" / other).touch()
    (tmp_path / "list.txt").write_text("# some\nb/00000.tar\n\n")
    a, b = [f"{tmp_path}/a/{i:05d}.tar" for i in (0, 1)], [f"{tmp_path}/b/00000.tar"]
    for metadata, paths in (
        (f"{tmp_path}/a/{{00001..00000}}.tar", a[::-1]),
        (tmp_path / "a", a),
        (tmp_path / "list.txt", b),
        (f"{tmp_path}/b::{tmp_path}/{{a}}/../a", None),
        (f"{tmp_path}/b::{tmp_path}/a/", b + a),
    ):
        if paths:
            assert shards.find_shards(metadata) == paths
    assert shards.root_of(a + b) == str(tmp_path)
    assert [name for name, *_ in rows_of(f"{tmp_path}/b::{tmp_path}/a")] == ["000.jpg"] * 2 + [
        "001.jpg"
    ]


@pytest.mark.parametrize(
    "metadata, match",
    [
        ("{0..3}.tar", r"\{0..3\}.tar matches no file; check the path and the pattern"),
        ("empty", "empty matches no file"),
        ("{00000..00004}.tar", "2 of its 5 shards are absent, the first is .*00003.tar; correct"),
        ("{00000..00002}.tar::00001.tar", "names .*00001.tar twice"),
        ("x.tar.gz", "x.tar.gz: packed tars cannot be read at random; unpack it to .tar"),
        ("packed", "y.tar.zst: packed tars"),
        ("gz.tar", "gz.tar: packed tars"),
        ("lfs.tar", "lfs.tar is a pointer of git-lfs"),
        ("no.tar", "no.tar is no tar; check the file"),
        ("00000", "shards are tars; rename it to .tar"),
        ("{0..9999999}.tar", "names over 1,000,000 files; shorten the range"),
        ("list.txt", "absent.tar|matches no file"),
        ("pipe.tar", "pipe.tar.*no regular file"),
        ("linked", "linked/1.tar is a link to /nowhere.tar, which is absent; mend or remove"),
    ],
)
def test_bad_names_and_files_are_one_line(tmp_path, monkeypatch, metadata, match):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path, [1, 1, 1])
    for folder in ("empty", "packed", "linked"):
        (tmp_path / folder).mkdir()
    os.symlink("/nowhere.tar", "linked/1.tar")
    os.mkfifo("pipe.tar")
    contents = {"x.tar.gz": b"", "packed/y.tar.zst": b"", "gz.tar": b"\x1f\x8b\x08", "00000": b""}
    contents |= {"lfs.tar": LFS, "no.tar": b"no tar" * 200, "list.txt": b"absent.tar\n"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=match) as error:
        load_captions("webdataset", metadata)
    assert "\n" not in str(error.value)


# --- members and captions -----------------------------------------------------------------------


def test_images_and_captions_of_every_kind(tmp_path, capsys):
    several = json.dumps({"caption": "json", "alt": ["one", None, "two"], "n": float("nan")})
    members = [
        ("b.txt", b"before its image"),
        ("a.jpg", JPEG),
        ("b.PNG", PNG),
        ("./sub.dir/c.d.WebP", WEBP),
        ("a.json", several.encode()),
        ("a.txt", "\ufeffa \u2028 caf\u00e9\n".encode()),
        ("sub.dir/c.d.TXT", b"dots"),
        ("b.json", b"{bad"),
        ("b.seg.png", PNG),
        ("._a.jpg", b"Mac"),
        ("e.jpeg", JPEG),
        ("e.json", b'{"caption": 5, "alt": "text"}'),
        ("f.cls", b"7"),
        ("g.txt", b"no image"),
        ("h.jpg", JPEG),
        ("h.txt", b" \n"),
        ("i.jpg", JPEG),
        ("i.txt", b"\xff"),
    ]
    write_tar(tmp_path / "a.tar", members)
    text = ("a.jpg", JPEG, ["a \u2028 caf\u00e9\n"])
    rest = [("b.PNG", PNG, ["before its image"]), ("sub.dir/c.d.WebP", WEBP, ["dots"])]
    assert rows_of(tmp_path) == [text, *rest]
    out = capsys.readouterr().out
    assert "3 pairs kept, 5 rows dropped" in out
    for reason in (
        "2 without a caption",
        "1 without an image",
        "1 with a caption that is not UTF-8",
        "1 without a .txt (of a .json, name the fields of captions)",
    ):
        assert reason in out
    assert rows_of(tmp_path, "caption")[0][2] == ["json"]
    out = capsys.readouterr().out
    assert "1 with a caption that is no text" in out
    assert "; 1 take their .txt, as .json lacks the fields named" in out
    found = rows_of(tmp_path, "alt", "n")
    assert [texts for *_, texts in found] == [["one", "two"], *(r[2] for r in rest), ["text"]]
    assert "3 nulls among the captions of others" in capsys.readouterr().out


def test_the_first_member_of_a_name_counts(tmp_path, capsys):
    write_tar(
        tmp_path / "0.tar", [("a.jpg", JPEG), ("a.png", PNG), ("a.txt", b"x"), ("a.txt", b"y")]
    )
    write_tar(tmp_path / "1.tar", [("a.jpg", JPEG), ("a.txt", b"z")])  # another shard's own
    assert rows_of(tmp_path) == [("a.jpg", JPEG, ["x"]), ("a.jpg", JPEG, ["z"])]
    assert "2 members of a name that their shard has already" in capsys.readouterr().out


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_members_of_other_kinds(tmp_path, form):
    """Beside tarfile, which reads them all."""
    names = ["x" * 96, "d" * 60 + "/" + "x" * 60, "d/" * 40 + "y" * 80]
    names += ["z" * 101, "e\u00e9" * 70] if form != tarfile.USTAR_FORMAT else []
    image, text = encoded(0), b"a caption"
    with tarfile.open(tmp_path / "a.tar", "w", format=form, encoding="utf-8") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            member.type, member.linkname, member.size = kind, "0.jpg", 10_000
            archive.addfile(member)
        for name in names:
            for end, data in ((".jpg", image), (".txt", text)):
                member = tarfile.TarInfo(name + end)
                member.size, member.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                archive.addfile(member, io.BytesIO(data))
    assert rows_of(tmp_path) == [(f"{name}.jpg", image, ["a caption"]) for name in names]
    with open(tmp_path / "a.tar", "rb", buffering=0) as file, tarfile.open(file.name) as peer:
        expected = [(m.name, m.offset_data, m.size) for m in peer if m.isreg()]
        assert list(map(tuple, tars.Tar(file).members())) == expected


def test_sparse_members_are_passed_over(tmp_path):
    """Old GNU ones, whose map continues behind the header, and those of pax."""
    sparse = tarfile.TarInfo("s.jpg")
    sparse.size, sparse.type = 512, b"S"
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    more = bytes(504) + b"\1" + bytes(7)
    pax = tarfile.TarInfo("p.jpg")
    pax.size, pax.pax_headers = 512, {"GNU.sparse.major": "1"}
    image = tarfile.TarInfo("a.jpg")
    image.size = len(JPEG)
    blocks = [bytes(header), more, bytes(512), b"data" * 128, pax.tobuf(tarfile.PAX_FORMAT)]
    blocks += [b"data" * 128, image.tobuf(), JPEG, bytes(-len(JPEG) % 512), bytes(1024)]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks))
    with open(tmp_path / "a.tar", "rb", buffering=0) as file:
        assert [member.name for member in tars.Tar(file).members()] == ["a.jpg"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.jpg", "/abs.jpg", "a.zip/b.tar/c.jpg", "a@1+2.jpg"]
)
def test_hostile_names_are_only_text(tmp_path, name):
    members = [(name, JPEG), (name[:-4] + ".txt", b"a\n\\"), ("\n.jpg", PNG)]
    write_tar(tmp_path / "t/a.tar", members)
    ((shown, data, texts),) = rows_of(tmp_path / "t")
    assert data == JPEG and texts == ["a\n\\"] and name.endswith(shown)
    pairs = load_captions("webdataset", tmp_path / "t")
    dataset = CaptionDataset(pairs, pairs.root, ("image", "text"), Preprocessing(image_size=32))
    assert dataset[0, [0]]["bad"] == []


# --- damage -------------------------------------------------------------------------------------


def test_damaged_shards_keep_their_whole_samples(tmp_path, capsys):
    pattern = write_shards(tmp_path, [3, 3, 3, 1, 1])
    sizes = [(tmp_path / f"{i:05d}.tar").stat().st_size for i in range(5)]
    data = (tmp_path / "00000.tar").read_bytes()
    place = data.index(b"002.txt")
    (tmp_path / "00000.tar").write_bytes(data[: place + 515])  # within the third caption
    (tmp_path / "00001.tar").write_bytes(data[:place] + b"X" + data[place + 1 :])
    (tmp_path / "00002.tar").write_bytes(data[: place + 1024])  # no end mark
    (tmp_path / "00003.tar").write_bytes(b"")
    (tmp_path / "00004.tar").write_bytes(bytes(sizes[4]))
    assert [name for name, *_ in rows_of(pattern)] == [f"00{i}.jpg" for i in (0, 1, 0, 1, 0, 1, 2)]
    first = f"{tmp_path}/00000.tar: it ends in the middle"
    out = capsys.readouterr().out
    assert "7 pairs kept, 2 rows dropped; 2 without a caption; 5 shards not readable to" in out
    assert first in out
    (index,) = tmp_path.glob("*.arrow")
    facts = arrow.read_facts(index)
    assert facts["lengths"] == [2, 2, 3, 0, 0]
    assert list(facts["damaged"].values()) == [
        "it ends in the middle",
        f"its header at byte {place} is damaged",
        "its end mark is missing",
        "it is empty",
        "it holds no sample",
    ]


@pytest.mark.parametrize("follows", ["tar", "hole", "zeros"])
def test_bytes_behind_the_end_are_told(tmp_path, follows):
    """Nothing is lost in silence behind zeros; those that fill a tar up are no damage."""
    data = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", b"x")]).read_bytes()
    place = data.index(b"a.txt")
    data = {
        "tar": data * 2,
        "hole": data[:place] + bytes(512) + data[place + 512 :],
        "zeros": data + bytes(10240),
    }[follows]
    (tmp_path / "a.tar").write_bytes(data)
    batch, _, damage = shards.index_shard(tmp_path / "a.tar", tmp_path, [])
    assert len(batch) == (follows != "hole")
    assert ("bytes follow its end" in (damage or "")) == (follows != "zeros")


def test_random_damage_ends_in_time_and_in_one_line(tmp_path):
    """Whatever a tar holds, members lie inside of it, and reading comes to an end."""
    path = write_tar(tmp_path / "a.tar", [("a" * 120 + ".jpg", JPEG), ("b.txt", b"x" * 600)] * 3)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            block = 512 * rng.randrange(len(data) // 512)
            at = block + rng.choice([rng.randrange(512), rng.randrange(124, 157)])
            data[at] = rng.randrange(256)
            header = data[block : block + 512]  # with a sum that holds
            total = sum(header) - sum(header[148:156]) + 256
            data[block + 148 : block + 156] = b"%06o\0 " % total
        path.write_bytes(data[: rng.randrange(len(data)) if rng.random() < 0.3 else None])
        with open(path, "rb", buffering=0) as file:
            tar, before = tars.Tar(file), 0
            for member in shards.split_members(tar, True)[0].values():
                assert before < member.offset <= member.offset + member.size <= tar.size
                before = member.offset
        batch, counts, _ = shards.index_shard(path, tmp_path, [])
        assert counts["kept"] == len(batch) <= 3


def test_a_shard_that_changes_is_indexed_anew_or_named(tmp_path):
    pattern = write_shards(tmp_path, [2, 2])
    pairs = load_captions("webdataset", pattern)
    path = pairs[1][0]
    before = read_file(pairs.root, path)
    other = [("000.jpg", JPEG + bytes(600)), ("x.jpg", JPEG), ("000.txt", b"new")]
    for change, reason in (
        (lambda: write_tar(tmp_path / "00000.tar", other), "has changed since it was indexed"),
        (lambda: os.truncate(tmp_path / "00000.tar", 700), "the tar ends before it"),
    ):
        change()
        with pytest.raises(InputError, match=f"00000.tar/001.jpg.*{reason}"):
            read_file(pairs.root, path)
        views = CaptionDataset(pairs, pairs.root, ("image",), Preprocessing(image_size=32))
        (bad,) = views[0, [1, 2]]["bad"]
        assert reason in bad and "\n" not in bad
    write_tar(tmp_path / "00000.tar", [("000.jpg", before), ("000.txt", b"new")])
    assert [texts for *_, texts in rows_of(pattern)] == [["new"], ["picture 2"], ["picture 3"]]
    # The same sizes under other names: the header tells.
    write_tar(tmp_path / "00000.tar", [("900.jpg", before), ("900.txt", b"old")])
    fresh = load_captions("webdataset", pattern)
    write_tar(tmp_path / "00000.tar", [("800.jpg", before), ("800.txt", b"old")])
    with pytest.raises(InputError, match="has changed"):
        read_file(fresh.root, fresh[0][0])
