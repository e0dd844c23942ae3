"""Meters, flags, errors and the files of a run."""

import fcntl
import multiprocessing
import os
import time

import pytest

import utils
from utils import InputError

CONTEXT = multiprocessing.get_context("fork")


@pytest.mark.parametrize("flags", [["--epoch", "3"], ["--count", "0"], ["--count", "x"], ["x"]])
def test_wrong_flags_are_input_errors(flags):
    parser = utils.ArgumentParser("script.py", "A script")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--count", type=utils.positive_int)
    with pytest.raises(InputError, match="script.py --help"):
        parser.parse_args(flags)


def test_atomic_writing_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_a_file_do_not_share_a_name(tmp_path):
    """As two containers do, whose process numbers are equal."""

    def write_around(file):
        file.write(b"first")
        utils.write_atomically(tmp_path / "file", lambda other: other.write(b"second, longer"))

    utils.write_atomically(tmp_path / "file", write_around)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_killed_writers_go_after_a_day(tmp_path):
    old, new, other = (tmp_path / f"f.{c * 16}.tmp" for c in "012")
    other = tmp_path / "f.of-mine.tmp"
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, time.time() - 25 * 3600))
    utils.write_json(tmp_path / "f", {})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "f", new, other])


def add_entries(path, own):
    for i in range(20):
        utils.update_json(path, {f"{own}-{i}": i})


def test_writers_at_once_keep_each_others_entries(tmp_path):
    path = tmp_path / "results.json"
    writers = [CONTEXT.Process(target=add_entries, args=(path, own)) for own in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    expected = {f"{own}-{i}": i for own in range(4) for i in range(20)}
    assert utils.read_json(path, "results") == expected
    assert os.listdir(tmp_path) == ["results.json"]


def test_without_locks_files_are_still_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with utils.locked(tmp_path / "x") as is_locked:
        assert not is_locked
    utils.update_json(tmp_path / "x", {"a": 1})
    assert utils.read_json(tmp_path / "x", "results") == {"a": 1}


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text, match",
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        (NESTED, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_read_json_names_the_file(tmp_path, text, match):
    path = tmp_path / "x.json"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=f"catalog .*x.json.*{match}"):
        utils.read_json(path, "catalog")
