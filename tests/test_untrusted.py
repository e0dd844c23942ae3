"""Strangers' files: pickles that name code, paths that leave their root, and special files."""

import operator
import os
import pickle
import signal

import numpy as np
import pytest

import captions
import utils
from captions import load_captions
from infra import archives, checkpoint, logger, untrusted, weights
from utils import InputError


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
    with pytest.raises(InputError, match="does not parse|1 with a caption that is no text"):
        load_captions("yfcc15m", tmp_path / "m.pkl")


class Payload:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Nested:
    """A function that unpickling would have to make first."""

    def __call__(self):
        pass

    def __reduce__(self):
        return operator.attrgetter, ("mkdir",)


PAYLOADS = {
    "posix.system": lambda target: Payload(os.system, f"touch {target}"),
    "posix.mkdir": lambda target: Payload(os.mkdir, target),
    "builtins.eval": lambda target: Payload(eval, f"open({target!r}, 'w')"),
    "operator.attrgetter": lambda target: Payload(Nested(), target),
    "builtins.print": lambda target: np.array([Payload(print, target)], dtype=object),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("dataset, suffix", [("yfcc15m", "pkl"), ("cc3m", "npy"), ("cc12m", "npy")])
def test_hostile_metadata_is_refused_unexecuted(tmp_path, name, dataset, suffix):
    target, metadata = tmp_path / "executed", tmp_path / f"m.{suffix}"
    payload = {"image_id": PAYLOADS[name](str(target)), "captions": ["a"]}
    if suffix == "npy":
        np.save(metadata, np.array([payload], dtype=object), allow_pickle=True)
    else:
        metadata.write_bytes(pickle.dumps([(1, payload, "b")]))
    with pytest.raises(InputError, match=rf"m\.... refused: it names {name}"):
        load_captions(dataset, metadata)
    assert not target.exists()


@pytest.mark.parametrize(
    "content, match",
    [
        (b"\x80\x04]r\xff\xff\xff\x7f.", "more memory than its size allows"),  # memo of 2**31
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.", "memory|does not parse"),
        (b"\x80\x02U\x01aQ.", "persistent id"),
        (b"\x80\x02\x82\x01.", "does not parse"),  # an extension code
    ],
)
def test_hostile_sizes_and_opcodes(tmp_path, content, match):
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(InputError, match=match):
        load_captions("yfcc15m", tmp_path / "m.pkl")


def test_a_path_stays_below_its_root(tmp_path):
    for path in ("a.jpg", "a/../b.jpg", "..a/b..jpg", "images/12/345.zip/678.jpg", f"{tmp_path}/a"):
        untrusted.check_inside(tmp_path, path, "image")
    untrusted.check_inside("/", "/etc/x", "image")
    (tmp_path / "link").symlink_to("/")
    untrusted.check_inside(tmp_path, "link/etc/passwd", "image")
    outside = (
        "..",
        "../a",
        "a/../../b",
        "/etc/passwd",
        f"{tmp_path}2/a",
        f"{tmp_path}/../a",
        "//a",
    )
    for path in (*outside, "12.zip/../../a.jpg"):
        with pytest.raises(
            InputError, match="image '.*' leaves its folder '.*or allow paths outside of the root"
        ):
            untrusted.check_inside(tmp_path, path, "image")
        untrusted.check_inside(tmp_path, path, "image", allowed=True)


READERS = {
    "image": lambda path: archives.read_file(path.parent, path.name),
    "archive": lambda path: archives.read_file(path.parent, f"{path.name}/1.jpg"),
    "pickle": lambda path: captions.load_captions("yfcc15m", path),
    "npy": lambda path: captions.load_captions("cc3m", path),
    "list": lambda path: captions.load_captions("redcaps", path),
    "table": lambda path: captions.load_captions("csv", path),
    "coco": lambda path: captions.load_captions("coco", path),
    "arrow": lambda path: captions.load_captions("csv", path),
    "checkpoint": checkpoint.load,
    "weights": weights.read,
    "digest": checkpoint.file_digest,
    "json": lambda path: utils.read_json(path, "labels"),
    "log": logger.read_log,
}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, reader, make):
    """A pipe that nobody writes to, a folder, a device without an end."""
    path = tmp_path / ("x.zip" if reader == "archive" else f"x.{reader}")
    make(path)
    is_folder = reader == "archive" and make is os.mkdir  # a folder may have such a name
    match = "1.jpg: No such file" if is_folder else "no regular file|is absent"
    signal.alarm(10)  # to wait is a failure
    try:
        with pytest.raises(InputError, match=match) as error:
            READERS[reader](path)
    finally:
        signal.alarm(0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
