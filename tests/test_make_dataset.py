"""Every conversion on small files in the published layouts, resuming, checking; the digits."""

import bz2
import gzip
import io
import json
import os
import signal
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import save_image, write_folders
from launch import REPOSITORY, run_script

import make_dataset
import utils
from captions import load_captions
from catalog import LABELS
from infra import arrow
from infra.archives import read_file
from infra.arrow import Captions
from utils import InputError


def make(*flags):
    make_dataset.main(make_dataset.get_args_parser().parse_args([str(flag) for flag in flags]))


def rows(path):
    pairs = Captions(path)
    return [pairs[i] for i in range(len(pairs))]


def write_yfcc(root, photos=range(900, 1050)):
    """The index holds photos 1000 to 1099 in random order, the subset those from 1020 to 1119."""
    index = np.random.default_rng(0).permutation(np.arange(1000, 1100))
    np.save(root / "index.npy", index)
    (root / "subset.tsv").write_text("".join(f"{i}\thash\n" for i in range(1020, 1120)))
    title = "A+%3Cb%3Enice%3C%2Fb%3E+dog%2C+see+http%3A%2F%2Fx.y%2Fz"
    about = (
        "%3Ca+href%3D%22http%3A%2F%2Fq.r%22+rel%3D%22nofollow%22%3Elink%3C%2Fa%3E+C%2B%2B+%C3%A9"
    )
    fields = [*["x"] * 7, title, about, *["y"] * 14]
    text = "".join("\t".join([str(i), *fields]) + "\n" for i in photos)
    return index.tolist(), text.encode()


def yfcc_flags(root, photos):
    names = ("--subset", root / "subset.tsv", "--index", root / "index.npy", "--photos", photos)
    return ("yfcc15m", *names, "--output", root / "out.arrow")


@pytest.mark.parametrize(
    "suffix, pack", [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_yfcc15m(tmp_path, capsys, suffix, pack):
    index, text = write_yfcc(tmp_path, range(900, 1110))
    photos = tmp_path / f"photos.txt{suffix}"
    photos.write_bytes(pack(text))
    make(*yfcc_flags(tmp_path, photos))
    out = capsys.readouterr().out
    assert "100 photos in the subset, 20 of them not in the index" in out
    assert "80 pairs kept, 130 rows dropped; 120 not in the subset; 10 not in the index" in out
    found = rows(tmp_path / "out.arrow")
    number = f"{index.index(1020):08d}"
    image = f"images/{number[:2]}/{number[2:5]}.zip/{number[5:]}.jpg"
    assert found[0] == (image, ["A nice dog, see ", "link C++ \u00e9"])
    assert len({image for image, _ in found}) == 80


def test_rows_without_an_image_in_an_archive_are_dropped(tmp_path, capsys):
    index, text = write_yfcc(tmp_path)
    (tmp_path / "photos.txt").write_bytes(text)
    save_image(tmp_path / "x.jpg", 0)
    (tmp_path / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images/00/000.zip", "w") as archive:
        for photo in (1025, 1030):
            archive.write(tmp_path / "x.jpg", f"{index.index(photo):03d}.jpg")
    make(*yfcc_flags(tmp_path, tmp_path / "photos.txt"), "--root", tmp_path)
    assert "2 pairs kept, 148 rows dropped; 120 not in the subset; 28 without" in (
        capsys.readouterr().out
    )


def test_redcaps(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    for name in ("birds", "cats"):
        parts = [
            {"image_id": f"{name}{i}", "subreddit": name, "caption": f"itap of {i}", "score": 0.5}
            for i in range(3)
        ]
        text = json.dumps({"info": {"version": 1}, "annotations": parts})
        (tmp_path / f"annotations/{name}_2017.json").write_text(text)
    flags = ("redcaps", "--annotations", tmp_path / "annotations", "--output", tmp_path / "r.arrow")
    make(*flags)
    assert len(rows(tmp_path / "r.arrow")) == 6
    save_image(tmp_path / "images/cats/cats1.jpg", 0)
    make(*flags, "--root", tmp_path / "images")
    assert rows(tmp_path / "r.arrow") == [("cats/cats1.jpg", ["itap of 1"])]
    assert "1 pairs kept, 5 rows dropped; 5 without an image" in capsys.readouterr().out
    (tmp_path / "annotations/dogs.json").write_text('{"annotations": [{"image_id": 1}]}')
    make(*flags)
    out = capsys.readouterr().out
    assert "6 pairs kept, 1 rows dropped; 1 malformed, the first in " in out
    assert "dogs.json, row 0: no 'subreddit'" in out


@pytest.mark.parametrize("head", ["", "caption\turl\n"])
@pytest.mark.parametrize("command, order", [("cc3m", (0, 1)), ("cc12m", (1, 0))])
def test_the_published_tables_of_conceptual_captions(tmp_path, capsys, command, order, head):
    links = [f"http://a.b/{i}.jpg" for i in range(4)]
    lines = [(f'a "dog {i}', link) for i, link in enumerate(links)]
    text = "".join("\t".join(line[i] for i in order) + "\n" for line in lines)
    (tmp_path / "t.tsv").write_text(head + text)
    names = [f"{i}_{zlib.crc32(link.encode())}" for i, link in enumerate(links)]
    for i in (0, 1, 3):
        save_image(tmp_path / f"images/{names[i]}.jpg", i)
        (tmp_path / f"images/{names[i]}.jpg").rename(tmp_path / f"images/{names[i]}")
    flags = (command, "--tsv", tmp_path / "t.tsv", "--root", tmp_path / "images")
    make(*flags, "--output", tmp_path / "c.arrow")
    assert "3 pairs kept, 1 rows dropped; 1 without an image" in capsys.readouterr().out
    assert rows(tmp_path / "c.arrow")[2] == (names[3], ['a "dog 3'])
    save_image(tmp_path / "images/2.jpg", 0)
    make(*flags, "--output", tmp_path / "c.arrow", "--image-name", "{name}")
    assert rows(tmp_path / "c.arrow") == [("2.jpg", ['a "dog 2'])]
    with pytest.raises(InputError, match="image name '{nme}': .*its fields are row, crc32"):
        make(*flags, "--image-name", "{nme}")
    with pytest.raises(InputError, match="give --tsv and --root, or --img2dataset alone"):
        make(command, "--tsv", tmp_path / "t.tsv")


def write_img2dataset(root, is_tar):
    """Two shards of four rows: the second caption is missing, the third image not downloaded."""
    save_image(root / "x.jpg", 0)
    data = (root / "x.jpg").read_bytes()
    for shard in ("00000", "00001"):
        keys = [f"{shard}{i:04d}" for i in range(4)]
        status = ["success", "success", "failed_to_download", "success"]
        table = {"key": keys, "caption": ["a", None, "c", "d"], "status": status, "url": keys}
        pa.parquet.write_table(pa.table(table), root / f"{shard}.parquet")
        if not is_tar:
            (root / shard).mkdir()
            for key in (keys[0], keys[1]):
                (root / shard / f"{key}.jpg").write_bytes(data)
            continue
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for name, content in ((f"{keys[0]}.jpg", data), (f"{keys[0]}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data


@pytest.mark.parametrize("is_tar", [False, True])
def test_img2dataset(tmp_path, capsys, is_tar):
    data = write_img2dataset(tmp_path, is_tar)
    make("cc12m", "--img2dataset", tmp_path, "--output", tmp_path / "c.arrow")
    out = capsys.readouterr().out
    assert "2 pairs kept, 6 rows dropped; 2 without a caption; 2 not downloaded (failed" in out
    assert "2 without an image" in out
    found = rows(tmp_path / "c.arrow")
    assert [texts for _, texts in found] == [["a"], ["a"]]
    assert [read_file(tmp_path, image) for image, _ in found] == [data, data]
    name = "00001.tar/000010000.jpg@" if is_tar else "00001/000010000.jpg"
    assert found[1][0].startswith(name)


def test_absent_inputs(tmp_path):
    for flag, suffix in (("redcaps --annotations", "json"), ("cc3m --img2dataset", "parquet")):
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(InputError, match=f"there is no .{suffix} file in {folder}"):
                make(*flag.split(), folder)
    with pytest.raises(InputError, match="absent.tsv: No such file"):
        make("yfcc15m", "--subset", tmp_path / "absent.tsv")


def test_tables_and_coco(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,hello\nb.jpg,you\n")
    make("csv", "--table", tmp_path / "t.csv", "--output", tmp_path / "t.arrow")
    assert rows(tmp_path / "t.arrow") == [("a.jpg", ["hello"]), ("b.jpg", ["you"])]
    texts = [{"image_id": i, "caption": c} for i, c in ((7, "a"), (8, "b"), (7, "c"))]
    coco = {"images": [{"id": 7, "file_name": "seven.png"}], "annotations": texts}
    (tmp_path / "c.json").write_text(json.dumps(coco))
    flags = ("--captions", tmp_path / "c.json", "--folder", "val", "--output", tmp_path / "c.arrow")
    make("coco", *flags)
    expected = [("val/seven.png", ["a", "c"]), ("val/000000000008.jpg", ["b"])]
    assert rows(tmp_path / "c.arrow") == expected
    assert "2 pairs kept, 0 rows dropped" in capsys.readouterr().out
    with pytest.raises(InputError, match="name it .arrow"):
        make("csv", "--table", tmp_path / "t.csv", "--output", tmp_path / "t.pkl")


KILLED = """
import os, signal, sys
sys.path.insert(0, {repository!r})
import make_dataset
from infra import arrow

arrow.BATCH, write_arrow = {batch}, arrow.write_arrow

def killed_at_the_third_part(path, batches, facts):
    def killing():
        yield from batches
        os.kill(os.getpid(), signal.SIGKILL)

    write_arrow(path, killing() if path.name == "000002.arrow" else batches, facts)

arrow.write_arrow = killed_at_the_third_part
make_dataset.main(make_dataset.get_args_parser().parse_args({flags!r}))
"""


def test_a_killed_conversion_resumes(tmp_path, capsys, monkeypatch):
    """SIGKILL once two parts are there: the next call writes the others, to the same result."""
    table, output, part = (tmp_path / name for name in ("t.csv", "out.arrow", "out.arrow.part"))
    batch, number = 2**10, 3900
    lines = "".join(f"{i}.jpg,title {i}\n" for i in range(number))
    table.write_text(f"filepath,title\n{lines}")
    flags = ("csv", "--table", str(table), "--output", str(output))
    code = KILLED.format(repository=str(REPOSITORY), batch=batch, flags=flags)
    (tmp_path / "killed.py").write_text(code)
    assert run_script(tmp_path / "killed.py", []).returncode == -signal.SIGKILL
    assert (part / "000001.arrow").exists() and not (part / "000002.arrow").exists()
    assert not output.exists()

    monkeypatch.setattr(arrow, "BATCH", batch)
    written, write_arrow = [], arrow.write_arrow

    def watched(path, *args):
        written.append(os.path.basename(path))
        write_arrow(path, *args)

    monkeypatch.setattr(arrow, "write_arrow", watched)
    make(*flags)
    assert f"{number:,} pairs kept, 0 rows dropped" in capsys.readouterr().out
    assert "000001.arrow" not in written and written[-2:] == ["000003.arrow", "merged.arrow"]
    assert rows(output) == [(f"{i}.jpg", [f"title {i}"]) for i in range(number)]
    assert not part.exists()


def write_catalog(root, **paths):
    entries = {
        name: {"path": str(path), "type": "imagefolder", "train": "train", "test": "test"}
        for name, path in paths.items()
    }
    (root / "catalog.json").write_text(json.dumps(entries))
    return root / "catalog.json"


def test_check_tells_what_can_be_used(tmp_path, capsys):
    labels = utils.read_json(LABELS, "labels")
    eurosat, stl10 = labels["eurosat"], labels["stl10"]
    for i in range(10):
        save_image(tmp_path / f"stl10/test/{stl10[i]}/0.png", i)
        save_image(tmp_path / f"mnist/test/{i}/0.png", i)
        save_image(tmp_path / f"eurosat/test/{i:02d}_{eurosat[9 - i]}/0.png", i)
    write_folders(tmp_path / "fer2013/test", classes=3)
    (tmp_path / "pairs.csv").write_text("filepath,title\nstl10/test/bird/0.png,a\n")
    names = ("stl10", "mnist", "eurosat", "fer2013", "food101", "unheard")
    catalog = write_catalog(tmp_path, **{name: tmp_path / name for name in names})
    (tmp_path / "unheard").mkdir()
    flags = ("check", "--catalog", catalog, "--metadata", tmp_path / "pairs.csv")
    with pytest.raises(InputError, match="as they are: eurosat, fer2013, unheard"):
        make(*flags, "--root", tmp_path)
    verdicts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert verdicts["stl10"].startswith("usable    test 10 images, no training split, some decoded")
    assert "10 classes, order agrees by 10 names" in verdicts["mnist"]
    assert (
        "is class 0, 'annual crop land', by its place, but class 9, 'lake or sea'"
        in verdicts["eurosat"]
    )
    assert "has 3 classes, but labels.json has 7" in verdicts["fer2013"]
    assert verdicts["food101"].startswith("absent")
    assert verdicts["csv"].startswith("usable    1 images with captions")

    (tmp_path / "mnist/test/3/0.png").write_bytes(b"")
    (tmp_path / "stl10/test/bird/0.png").unlink()
    with pytest.raises(InputError, match="stl10, mnist, eurosat, fer2013, unheard, csv; see above"):
        make(*flags, "--root", tmp_path)
    out = capsys.readouterr().out
    assert "test/3/0.png is empty, or no image" in out and "bird/0.png: No such file" in out


def test_images_outside_of_the_root(tmp_path, capsys):
    """An error when images are looked up, and not a row to drop."""
    save_image(tmp_path / "out.png", 0)
    (tmp_path / "root").mkdir()
    (tmp_path / "m.csv").write_text("filepath,title\n../out.png,a\n")
    flags = ("csv", "--table", tmp_path / "m.csv", "--output", tmp_path / "m.arrow")
    flags = (*flags, "--root", tmp_path / "root")
    with pytest.raises(InputError, match="m.csv: image '../out.png' leaves its folder '.*root'"):
        make(*flags)
    assert not (tmp_path / "m.arrow").exists()
    make(*flags, "--allow-outside-root")
    assert rows(tmp_path / "m.arrow") == [("../out.png", ["a"])]
    (tmp_path / "none.json").write_text("{}")
    flags = ("check", "--catalog", tmp_path / "none.json", "--metadata", tmp_path / "m.arrow")
    flags = (*flags, "--root", tmp_path / "root")
    with pytest.raises(InputError, match="as they are: csv"):
        make(*flags)
    assert "m.arrow: image '../out.png' leaves its folder" in capsys.readouterr().out
    make(*flags, "--allow-outside-root")


@pytest.mark.parametrize("command", ["check", "download --datasets food101"])
def test_a_catalog_that_leaves_its_folder(tmp_path, command):
    catalog = write_catalog(tmp_path, food101="../out")
    with pytest.raises(InputError, match="'food101' '../out' leaves its folder"):
        make(*command.split(), "--catalog", catalog)


def test_digits(tmp_path, capsys):
    root = tmp_path / "digits"
    make = make_dataset.get_args_parser().parse_args(["digits", "--root", str(root)])
    make_dataset.main(make)
    assert "256 images with 1280 captions, 1541 held out" in capsys.readouterr().out

    captions = load_captions("coco", root / "annotations/captions_train2017.json")
    assert len(captions) == 256 and len(captions[0][1]) == 5
    names = utils.read_json(LABELS, "labels")["digits"]
    folders = sorted(path.name for path in (root / "test").iterdir())
    assert folders == [f"{i}_{name}" for i, name in enumerate(names)]
    test = {int(path.stem) for path in (root / "test").glob("*/*.png")}
    train = {int(path.stem) for path in (root / "train2017").glob("*.jpg")}
    assert len(test) == 1541 and len(train) == 256 and not test & train
    named = {path.stem: path.parent.name[2:] for path in (root / "train").glob("*/*.png")}
    for i in range(0, 256, 10):  # every caption of an image names the digit of its folder
        image, texts = captions[i]
        assert all(named[image[-8:-4]] in text for text in texts)

    make_dataset.main(make)
    assert "is there already" in capsys.readouterr().out
