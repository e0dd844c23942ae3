"""Strangers' files: archives, paths that leave their root, and what is no file at all."""

import os
import signal
import zipfile

import pytest

import captions
import utils
from infra import archives, checkpoint, logger, untrusted
from utils import InputError


def test_bad_archives_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a.zip/1.jpg: it is no zip"):
        archives.read_file(tmp_path, "a.zip/1.jpg")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("2.jpg", b"x")
    with pytest.raises(InputError, match="b.zip/1.jpg.*no item named"):
        archives.read_file(tmp_path, "b.zip/1.jpg")
    with pytest.raises(InputError, match="c.zip/1.jpg: No such file"):
        archives.read_file(tmp_path, "c.zip/1.jpg")


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
            InputError, match="image '.*' leaves its folder '.*--allow-outside-root"
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
    signal.alarm(10)  # to wait is a failure
    try:
        with pytest.raises(InputError, match="no regular file|is absent") as error:
            READERS[reader](path)
    finally:
        signal.alarm(0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
