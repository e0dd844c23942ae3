"""Caption sets and parquet written as shards; what our index and webdataset read of them."""

import json
import os
import pickle
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from helpers import encoded, save_image, step_losses, train, write_coco

import make_dataset
import shard_writer
from captions import load_captions
from infra.archives import read_file
from utils import InputError


def make(*flags):
    make_dataset.main(make_dataset.get_args_parser().parse_args([str(flag) for flag in flags]))


def rows_of(folder, *keys):
    """[(key, bytes of the image, captions)] as our index has them."""
    pairs = load_captions("webdataset", folder, ("", "", *keys))
    found = [pairs[i] for i in range(len(pairs))]
    names = [path.partition(".tar/")[2].partition(".")[0] for path, _ in found]
    data = [read_file(pairs.root, path) for path, _ in found]
    return list(zip(names, data, [texts for _, texts in found], strict=True))


def peer_rows(folder):
    """[(key, bytes of the image, .txt, .json)] as webdataset has them."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    images = ("jpg", "png", "webp")
    return [
        (s["__key__"], next(s[i] for i in images if i in s), s["txt"], s.get("json"))
        for s in samples
    ]


def test_image_bytes_and_captions_stay(tmp_path, capsys):
    """From coco, with several captions, and from the shards again."""
    metadata = write_coco(tmp_path, 7)
    out = tmp_path / "out"
    flags = ["--dataset", "coco", "--metadata", metadata, "--root", tmp_path, "--per-shard", 3]
    make("shards", *flags, "--output", out)
    said = capsys.readouterr().out
    assert f"{out}: 7 pairs kept, 0 rows dropped" in said
    assert f"--dataset webdataset --metadata {out} --json-caption-key captions" in said
    assert sorted(path.name for path in out.glob("*.tar")) == [f"0000{i}.tar" for i in range(3)]
    files = [(tmp_path / f"train2017/{i:012d}.jpg").read_bytes() for i in range(7)]
    texts = [[f"picture {i}", f"a photo of thing number {i}"] for i in range(7)]
    keys = [f"{i:09d}" for i in range(7)]
    assert rows_of(out, "captions") == list(zip(keys, files, texts, strict=True))
    assert rows_of(out) == [(k, f, t[:1]) for k, f, t in zip(keys, files, texts, strict=True)]
    for peer, row in zip(peer_rows(out), rows_of(out, "captions"), strict=True):
        key, data, text, several = peer
        assert (key, data, json.loads(several)["captions"]) == row and text.decode() == row[2][0]
    again = ["--dataset", "webdataset", "--json-caption-key", "captions", "--per-shard", 3]
    make("shards", "--metadata", out, *again, "--output", tmp_path / "again")
    for i in range(3):
        name = f"0000{i}.tar"
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_images_in_archives_of_every_format(tmp_path, capsys):
    """A blank first caption, an image that is absent, one of another format."""
    images = [encoded(0), encoded(1, "PNG"), encoded(2, "WEBP"), encoded(3, "GIF"), encoded(4)]
    (tmp_path / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images/00/000.zip", "w") as archive:
        for i, data in enumerate(images[:4]):
            archive.writestr(f"00{i}.jpg", data)
    rows = [(i, "" if i == 1 else f"title {i}", f"about {i}") for i in range(5)]
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(rows))
    flags = ["--dataset", "yfcc15m", "--metadata", tmp_path / "m.pkl", "--root", tmp_path]
    make("shards", *flags, "--output", tmp_path / "out")
    out = capsys.readouterr().out
    assert "3 pairs kept, 2 rows dropped" in out and "no JPEG, PNG or WebP" in out
    assert "1 without a readable image" in out and "the first: image" in out and "004.jpg" in out
    found = rows_of(tmp_path / "out", "captions")
    assert [data for _, data, _ in found] == images[:3]
    assert found[1][2] == ["", "about 1"] and rows_of(tmp_path / "out")[1][2] == ["about 1"]


@pytest.mark.parametrize("is_struct", [True, False])
def test_parquet_with_the_bytes_of_images(tmp_path, capsys, is_struct):
    """Groups of rows that end within shards, several files, lists of captions, nulls."""
    images = [encoded(i, ("JPEG", "PNG")[i % 2]) for i in range(11)]
    texts = [[f"one {i}", f"two {i}"] if i % 3 == 0 else [f"one {i}"] for i in range(11)]
    texts[4], images[5] = [""], None
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = [{"bytes": data, "path": "x.jpg"} for data in images] if is_struct else images
    column = pa.array(column, struct if is_struct else pa.binary())
    table = pa.table({"n": range(11), "image": column, "text": texts})
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (first, size) in enumerate(((0, 7), (7, 4))):
        path = folder / f"train-{i:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(table.slice(first, size), path, row_group_size=3)
    kept = [i for i in range(11) if i not in (4, 5)]
    expected = [(f"{i:09d}", images[i], texts[i]) for i in kept]
    columns = ["--csv-img-key", "image", "--csv-caption-key", "text", "--per-shard", 4]
    for metadata in (folder, f"{folder}/train-{{00000..00001}}-of-00002.parquet"):
        out = tmp_path / str(len(str(metadata)))
        make("shards", "--metadata", metadata, "--output", out, *columns)
        said = capsys.readouterr().out
        assert "9 pairs kept, 2 rows dropped" in said
        assert "1 without a caption" in said and "1 without the bytes of an image" in said
        assert rows_of(out, "captions") == expected
    with pytest.raises(InputError, match="00000-of-00002.parquet: no column 'title'; name one"):
        make("shards", "--metadata", folder, "--output", out, "--csv-img-key", "image")


def test_a_parquet_file_that_is_damaged(tmp_path):
    data = {"image": [encoded(i) for i in range(4)], "title": list("abcd")}
    pyarrow.parquet.write_table(pa.table(data), tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    columns = ["--csv-img-key", "image", "--output", tmp_path / "out"]
    for spoiled in (whole[:100], b"PAR1" + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        (tmp_path / "a.parquet").write_bytes(spoiled)
        with pytest.raises(InputError, match="a.parquet: ") as error:
            make("shards", "--metadata", tmp_path / "a.parquet", *columns)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "out").glob("*.tar*"))


def write_table(root, number):
    for i in range(number):
        save_image(root / f"{i}.jpg", i)
    lines = "".join(f"{i}.jpg,text {i}\n" for i in range(number))
    (root / "t.csv").write_text(f"filepath,title\n{lines}")
    return ["shards", "--metadata", root / "t.csv", "--root", root, "--per-shard", 2]


def test_an_interrupted_call_resumes(tmp_path, capsys, monkeypatch):
    flags = write_table(tmp_path, 5)
    os.unlink(tmp_path / "1.jpg")
    make(*flags, "--output", tmp_path / "whole")
    members_of, calls = shard_writer.members_of, []

    def interrupted(*sample):
        calls.append(sample)
        if len(calls) == 4:  # within the third shard
            raise KeyboardInterrupt
        return members_of(*sample)

    monkeypatch.setattr(shard_writer, "members_of", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(*flags, "--output", out)
    assert sorted(os.listdir(out)) == ["00000.tar", "00001.tar", "conversion.json"]
    capsys.readouterr()
    (out / f"00002.tar.{'0' * 16}.tmp").touch()  # of a process that was killed
    make(*flags, "--output", out)
    assert not list(out.glob("*.tmp"))
    assert "4 pairs kept, 1 rows dropped; 1 by an earlier call" in capsys.readouterr().out
    assert len(calls) == 4 + 1
    for i in range(3):
        name = f"0000{i}.tar"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_of_other_shards_stays_as_it_is(tmp_path):
    flags = write_table(tmp_path, 3)
    make(*flags, "--output", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x.tar").write_bytes(b"x")
    foreign, other = ["--output", tmp_path / "foreign"], ["--output", tmp_path / "out"]
    for extra in (foreign, [*other, "--per-shard", 1]):
        with pytest.raises(InputError, match="holds other shards; choose another"):
            make(*flags, *extra)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert os.listdir(tmp_path / "foreign") == ["x.tar"]


def test_without_a_readable_image(tmp_path):
    flags = write_table(tmp_path, 3)
    first = "the first 3 images cannot be read; check the root; image //0.jpg: No such file"
    for root, match in (("/", first), ("no", "root 'no' is not a folder")):
        with pytest.raises(InputError, match=match):
            make(*flags, "--root", root, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(0, "GIF"))
    with pytest.raises(InputError, match="no image can be written; 0 pairs kept, 3 rows dropped"):
        make(*flags, "--output", tmp_path / "gif")
    (tmp_path / "t.csv").write_text("filepath,title\n../x.jpg,a\n")
    with pytest.raises(InputError, match=r"image '../x.jpg' leaves its folder"):
        make(*flags, "--output", tmp_path / "other")


def test_digits_as_coco_table_and_shards_train_alike(tiny, tmp_path, monkeypatch):
    """Losses are equal bit for bit: the same order, crops and captions."""
    from sklearn.datasets import load_digits

    root = tmp_path / "digits"
    make_dataset.save_captioned(load_digits(), range(16), str(root))
    coco = root / "annotations/captions_train2017.json"
    pairs = load_captions("coco", coco)
    found = [pairs[i] for i in range(len(pairs))]
    columns = {"filepath": [path for path, _ in found], "title": [texts for _, texts in found]}
    pyarrow.parquet.write_table(pa.table(columns), root / "t.parquet")
    flags = ["--dataset", "coco", "--metadata", coco, "--root", root, "--per-shard", 5]
    make("shards", *flags, "--output", root / "s")
    sets = {"coco": (coco, root), "csv": (root / "t.parquet", root), "webdataset": (root / "s", "")}
    for name, (metadata, folder) in sets.items():
        flags = ["--dataset", name, "--metadata", metadata, "--root", folder, "--shuffle-window", 0]
        flags += ["--json-caption-key", "captions"]
        train(tiny, tmp_path / name, *flags, model="SLIP_NANO8", val="none")
    losses = [step_losses(tmp_path / name) for name in sets]
    assert len(losses[0]) == 4 and losses[0] == losses[1] == losses[2]
