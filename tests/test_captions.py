"""Caption sources from real files, plain-data reading, and the Arrow file they become."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from conftest import save_image

import captions
from captions import load_captions
from files import has_file
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


MAKERS = {
    "yfcc15m": make_yfcc15m,
    "coco": make_coco,
    "cc3m": make_cc3m,
    "cc12m": make_cc12m,
    "redcaps": make_redcaps,
    "csv": make_csv,
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


def test_numpy_1_object_arrays_are_read(tmp_path):
    """Pickles of NumPy 1 name numpy.core; protocol 2 spells bytes by _codecs.encode."""
    rows = np.array([{"image_id": "1.jpg", "captions": ["a"]}], dtype=object)
    old = pickle.dumps(rows, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    with open(tmp_path / "m.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(old)
    assert b"numpy.core." in old and b"_codecs" in old
    assert load_captions("cc3m", tmp_path / "m.npy")[0] == ("1.jpg", ["a"])


class Crafted:
    """Pickles as a call of an allowed NumPy name, with arguments and a state of one's choice."""

    def __init__(self, function, arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Crafted(np.dtype, ("V16", False, True), (3, "|", None, ("a",), {"a": ("O", 0)}, 16, 1, 0)),
        Crafted(np.ndarray, ((1,), np.dtype("O"), b"A" * 16)),
        Crafted(np.float64(0).__reduce__()[0], (np.dtype("O"), b"A" * 8)),
        np.zeros((2, 2)),
        np.array([{"captions": "a"}], dtype=object),
    ],
)
def test_numpys_own_objects_are_never_built(tmp_path, value):
    """Fed with a hostile state, NumPy's dtype and ndarray read memory that is not theirs."""
    (tmp_path / "m.pkl").write_bytes(pickle.dumps([(1, value, "b")]))
    with pytest.raises(InputError, match="does not parse|row 0"):
        load_captions("yfcc15m", tmp_path / "m.pkl")


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name, suffix", [("yfcc15m", "pkl"), ("cc3m", "npy"), ("cc12m", "npy")])
def test_hostile_metadata_is_refused_unexecuted(tmp_path, name, suffix):
    target, metadata = tmp_path / "executed", tmp_path / f"m.{suffix}"
    rows = np.array([{"image_id": Payload(target), "captions": ["a"]}], dtype=object)
    if suffix == "npy":
        np.save(metadata, rows, allow_pickle=True)
    else:
        metadata.write_bytes(pickle.dumps([(1, Payload(target), "b")]))
    with pytest.raises(InputError, match=r"m\.... refused: it names posix.mkdir"):
        load_captions(name, metadata)
    assert not target.exists()


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("nope", b"", "unknown dataset 'nope'; choose from yfcc15m, coco"),
        ("coco", None, "No such file or directory; check the path"),
        ("coco", b"{not json", "row 0: lexical error"),
        ("coco", b'{"images": []}', "holds no image"),
        ("coco", b'{"annotations": []}', "holds no image"),
        ("coco", b'{"annotations": 3}', "holds no image"),
        (
            "coco",
            b'{"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2}]}',
            "row 1: no 'caption'",
        ),
        ("coco", b'{"annotations": [{"image_id": "x", "caption": "a"}]}', "row 0: invalid literal"),
        ("coco", b'{"annotations": [{"image_id": 1, "caption": 5}]}', "row 0"),
        ("yfcc15m", pickle.dumps([(1, "\ud800", "b")]), "row 0.*surrogates"),
        ("redcaps", b'[{"image_id": 1, "caption": "a"}]', "row 0: no 'subreddit'"),
        ("redcaps", b"[7]", "row 0"),
        ("yfcc15m", pickle.dumps([(1, "a", "b"), (2, "a")]), "row 1"),
        ("yfcc15m", pickle.dumps([(1, "a", None)]), "row 0: 'NoneType'"),
        ("yfcc15m", pickle.dumps([(1, "a", "b")])[:-4], "does not parse"),
        ("yfcc15m", b"", "does not parse"),
        ("cc3m", b"not npy", "does not parse"),
        ("csv", b"a,b\n1,2\n", "no columns 'filepath' and 'title' in its header 'a,b'"),
        ("csv", b"filepath,title\n1.jpg\n", "row 0"),
        ("csv", b"\xff\xfe\x00", "row 0: 'utf-8' codec"),
        ("csv", b"filepath,title", "holds no image"),
        ("csv", b'filepath,title\n1.jpg,"a\n2.jpg,b\n', "row 0: unexpected end of data"),
        ("csv", b'filepath,title\n1.jpg,a\n2.jpg,"b" c\n', "row 1"),
    ],
)
def test_bad_metadata_is_one_line_that_names_file_and_row(tmp_path, name, content, match):
    path = tmp_path / "metadata"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        load_captions(name, path)
    assert "\n" not in str(error.value)
