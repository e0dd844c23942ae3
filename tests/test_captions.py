"""Caption sources from real files, bad metadata, and the cache of the archived formats."""

import json
import os
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import LFS, encoded, save_image, write_tar

import captions
from captions import load_captions
from infra.archives import has_file
from utils import InputError


def picture(path, seed=0):
    save_image(path, seed)
    return path


def make_yfcc15m(root):
    picture(root / "456.jpg")
    (root / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(root / "images/00/123.zip", "w") as archive:
        archive.write(root / "456.jpg", "456.jpg")
    (root / "m.pkl").write_bytes(pickle.dumps([(123456, "a title", "")]))
    return "m.pkl", ("images/00/123.zip/456.jpg", ["a title", ""])


def make_coco(root):
    picture(root / "train2017/000000000042.jpg")
    rows = [{"image_id": 42, "caption": "a"}, {"image_id": 42, "caption": "b"}]
    (root / "m.json").write_text(json.dumps({"annotations": rows}))
    return "m.json", ("train2017/000000000042.jpg", ["a", "b"])


def make_cc3m(root):
    picture(root / "sub/1.jpg")
    rows = np.array([{"image_id": "sub/1.jpg", "captions": ["a", "b"]}], dtype=object)
    np.save(root / "m.npy", rows, allow_pickle=True)
    return "m.npy", ("sub/1.jpg", ["a", "b"])


def make_cc12m(root):
    picture(root / "sub/1.jpg")
    row = {"image_name": "sub/1.jpg", "image_id": np.int64(1), "captions": "only one"}
    np.save(root / "m.npy", np.array([row], dtype=object), allow_pickle=True)
    return "m.npy", ("sub/1.jpg", ["only one"])


def make_redcaps(root):
    picture(root / "birds/abc.jpg")
    row = {"image_id": "abc", "subreddit": "birds", "caption": "itap of a bird"}
    (root / "m.json").write_text(json.dumps([row]))
    return "m.json", ("birds/abc.jpg", ["itap of a bird"])


def make_csv(root):
    picture(root / "1.jpg")
    (root / "m.csv").write_text('id\tfilepath\ttitle\n7\t1.jpg\t"two, words"\n')
    return "m.csv", ("1.jpg", ["two, words"])


def make_webdataset(root):
    image = encoded(0)
    write_tar(root / "m.tar", [("sub/1.txt", b"a dog"), ("sub/1.jpg", image)])
    return "m.tar", (f"m.tar/sub/1.jpg@1536+{len(image)}", ["a dog"])


MAKERS = {
    "yfcc15m": make_yfcc15m,
    "coco": make_coco,
    "cc3m": make_cc3m,
    "cc12m": make_cc12m,
    "redcaps": make_redcaps,
    "csv": make_csv,
    "webdataset": make_webdataset,
}


@pytest.mark.parametrize("name", captions.SOURCES)
def test_every_source_reads_its_files(name, tmp_path):
    metadata, expected = MAKERS[name](tmp_path)
    pairs = load_captions(name, tmp_path / metadata)
    assert len(pairs) == 1 and pairs[0] == expected
    assert has_file(tmp_path, expected[0])


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_separator_is_found(tmp_path, separator, newline):
    lines = [
        ["caption", "url", "image"],
        ["a\u2028dog\x0c", "x", "1.jpg"],
        ['"a\n  cat"', "y", "2.jpg"],
    ]
    text = newline.join(separator.join(line) for line in lines)
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    captions = load_captions("csv", tmp_path / "m.csv", ("image", "caption"))
    assert [captions[0], captions[1]] == [("1.jpg", ["a\u2028dog\x0c"]), ("2.jpg", ["a\n  cat"])]


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("nope", b"", "unknown dataset 'nope'; choose from yfcc15m, coco"),
        ("coco", None, "No such file or directory; check the path"),
        ("coco", b"{not json", "row 0: lexical error"),
        ("coco", b'{"images": []}', "holds no image"),
        ("coco", b'{"annotations": []}', "holds no image"),
        ("coco", b'{"annotations": 3}', "holds no image"),
        ("coco", b'{"annotations": [{"image_id": 1}]}', "1 rows dropped; 1 without a caption"),
        ("coco", b'{"annotations": [{"caption": "a"}]}', "malformed.*row 0: no 'image_id'"),
        ("coco", b'{"annotations": [{"image_id": "x", "caption": "a"}]}', "no file name and no"),
        ("coco", b'{"annotations": [{"image_id": 1, "caption": 5}]}', "a caption that is no text"),
        ("yfcc15m", pickle.dumps([(1, "\ud800", "b")]), "1 with a caption that is not UTF-8"),
        ("redcaps", b'[{"image_id": 1, "caption": "a"}]', "row 0: no 'subreddit'"),
        ("redcaps", b"[7]", "malformed, the first in .*row 0"),
        (
            "yfcc15m",
            pickle.dumps([(2, "a")]),
            "the first in .*metadata, row 0: not enou",
        ),
        ("yfcc15m", pickle.dumps([(1, None, None)]), "1 without a caption"),
        ("yfcc15m", pickle.dumps([(1, "a", "b")])[:-4], "does not parse"),
        ("yfcc15m", b"", "does not parse"),
        ("cc3m", b"not npy", "does not parse"),
        ("csv", b"a,b\n1,2\n", "no columns 'filepath' and 'title' in its header 'a,b'"),
        ("csv", b"filepath,title\n1.jpg\n", "1 with fewer fields than the header"),
        ("csv", b"filepath,title,title\n1.jpg,a,b\n", "names a column twice"),
        ("csv", "filepath,title".encode("utf-16"), "no columns 'filepath' and 'title' in its hea"),
        ("csv", b"filepath,title", "holds no image"),
        ("csv", b'filepath,title\n1.jpg,"a\n2.jpg,b\n', "row 0: unexpected end of data"),
    ],
)
def test_bad_metadata_is_one_line_that_names_file_and_row(tmp_path, name, content, match):
    path = tmp_path / "metadata"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        load_captions(name, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, kind", [(LFS, "pointer of git-lfs"), (b"<html>", "web page")])
@pytest.mark.parametrize("name", ["m.arrow", "m.csv", "m.npy", "m.pkl", "m.json", "m.tsv"])
def test_metadata_that_are_another_file(tmp_path, name, content, kind):
    """Every reader says so; "not plain data" would tell nobody what it is."""
    dataset = {"m.npy": "cc3m", "m.pkl": "yfcc15m", "m.json": "coco"}.get(name, "csv")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is a {kind}; "):
        load_captions(dataset, tmp_path / name)


# --- the cache ----------------------------------------------------------------------------------


def write_rows(path, number):
    path.write_bytes(pickle.dumps([(i, f"title {i}", "x" * (i % 7)) for i in range(number)]))


def test_the_archived_format_is_converted_once(tmp_path):
    write_rows(tmp_path / "m.pkl", 70_000)  # more than one batch
    pairs = load_captions("yfcc15m", tmp_path / "m.pkl")
    (cache,) = tmp_path.glob("*.arrow")
    assert len(pairs) == 70_000 and not list(tmp_path.glob("*.part"))
    for i in (0, 65_535, 65_536, 69_999):
        name = f"{i:08d}"
        image = f"images/{name[:2]}/{name[2:5]}.zip/{name[5:]}.jpg"
        assert pairs[i] == (image, [f"title {i}", "x" * (i % 7)])
    for i in (-1, 70_000):
        with pytest.raises(IndexError):
            pairs[i]

    written = cache.stat().st_mtime_ns
    assert load_captions("yfcc15m", tmp_path / "m.pkl")[5] == pairs[5]
    assert load_captions("csv", cache)[5] == pairs[5]  # given itself, whatever --dataset says
    assert cache.stat().st_mtime_ns == written
    write_rows(tmp_path / "m.pkl", 3)  # changed: converted again
    assert len(load_captions("yfcc15m", tmp_path / "m.pkl")) == 3
    assert pickle.loads(pickle.dumps(pairs))[69_999] == pairs[69_999]


def test_columns_of_a_table_have_caches_of_their_own(tmp_path):
    (tmp_path / "m.csv").write_text("image,a,b\n1.jpg,x,y\n")
    assert load_captions("csv", tmp_path / "m.csv", ("image", "a"))[0] == ("1.jpg", ["x"])
    assert load_captions("csv", tmp_path / "m.csv", ("image", "b"))[0] == ("1.jpg", ["y"])


def test_a_read_only_folder_has_its_cache_at_home(tmp_path, monkeypatch):
    write_rows(tmp_path / "m.pkl", 3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(load_captions("yfcc15m", tmp_path / "m.pkl")) == 3
    assert list((tmp_path / "home/.cache/slip").glob("m.pkl.*.arrow"))
    assert not list(tmp_path.glob("*.arrow"))


def test_a_home_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    write_rows(tmp_path / "m.pkl", 3)
    (tmp_path / "home").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(
        InputError, match="in a read-only folder: .*home/.cache/slip: .*another HOME"
    ):
        load_captions("yfcc15m", tmp_path / "m.pkl")


def test_parquet_tables(tmp_path):
    table = pa.table({"url": ["a", "b"], "text": ["x", "y"], "other": [1, 2]})
    pa.parquet.write_table(table, tmp_path / "m.parquet")
    pairs = load_captions("csv", tmp_path / "m.parquet", ("url", "text"))
    assert [pairs[0], pairs[1]] == [("a", ["x"]), ("b", ["y"])]
    with pytest.raises(InputError, match="m.parquet: no column 'title'; name one it has"):
        load_captions("csv", tmp_path / "m.parquet", ("url", "title"))
