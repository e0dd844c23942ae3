"""The index of tar shards: restart, parts that are read again, processes, another place."""

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from helpers import assert_equal, encoded, write_shards, write_tar
from test_shards import rows_of

import shards
import utils
from captions import load_captions
from datasets import CaptionDataset
from infra import arrow
from infra.archives import read_file
from preprocessing import Preprocessing
from utils import InputError

JPEG = encoded(0)


def test_an_interrupted_index_resumes_at_a_shard(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [2, 1, 3, 2])
    monkeypatch.setattr(shards, "BATCH", 2)
    read, index_shard = [], shards.index_shard

    def watched(path, root, keys):
        read.append(os.path.basename(path))
        if len(read) == 3:
            raise KeyboardInterrupt
        return index_shard(path, root, keys)

    monkeypatch.setattr(shards, "in_parallel", lambda function, items: map(function, items))
    monkeypatch.setattr(shards, "index_shard", watched)
    with pytest.raises(KeyboardInterrupt):
        load_captions("webdataset", pattern)
    pairs = load_captions("webdataset", pattern)
    # The first part holds one shard; the second was read, but its part had not enough pairs yet.
    assert read == [f"0000{i}.tar" for i in (0, 1, 2, 1, 2, 3)]
    assert [pairs[i][1] for i in range(8)] == [[f"picture {i}"] for i in range(8)]
    assert arrow.read_facts(pairs.path)["lengths"] == [2, 1, 3, 2]
    load_captions("webdataset", pattern)
    assert len(read) == 6  # the index is kept


def test_processes_and_one_agree_on_an_index(tmp_path, monkeypatch):
    """An error of a worker is one line."""
    pattern = write_shards(tmp_path, [1] * 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    many = rows_of(pattern)
    for index in tmp_path.glob("*.arrow"):
        index.unlink()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {})
    assert rows_of(pattern) == many and len(many) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(shards, "split_members", lambda *args: bad_shard())
    (tmp_path / "00000.tar").touch()
    with pytest.raises(InputError) as error:
        rows_of(pattern)
    assert utils.one_line(error.value) == "metadata x: bad"


def bad_shard():
    raise InputError("metadata x: bad")


def large_result(folder, number):
    (folder / str(os.getpid())).touch()
    return bytes(2**20)  # more than a pipe holds


def work_for_ever(folder):
    os.sched_getaffinity = lambda process: {0, 1}
    for _ in shards.in_parallel(partial(large_result, folder), range(8)):
        time.sleep(60)


def has_ended(process):
    path = Path(f"/proc/{process}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Even while nobody takes their results; else they would keep the lock of the index."""
    parent = multiprocessing.get_context("fork").Process(target=work_for_ever, args=(tmp_path,))
    parent.start()
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    workers = [path.name for path in tmp_path.iterdir()]
    parent.kill()
    parent.join()
    while not all(map(has_ended, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2 and all(map(has_ended, workers))


def test_an_index_goes_with_its_shards(tmp_path):
    """To another place, with its folder as the root; without it nothing is looked for."""
    pairs = load_captions("webdataset", write_shards(tmp_path / "a", [2]))
    expected = read_file(pairs.root, pairs[1][0])
    os.rename(pairs.path, tmp_path / "a/index.arrow")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_captions("webdataset", tmp_path / "b/index.arrow")
    assert moved.root == "" and read_file(tmp_path / "b", moved[1][0]) == expected
    views = CaptionDataset(moved, tmp_path / "b", ("image",), Preprocessing(image_size=32))
    assert_equal(views[0, [1]]["source"]["path"], moved[1][0])
    assert torch.is_tensor(views[0, [0]]["image"])


def test_only_shards_that_changed_are_read_again(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [2, 3, 1, 2])
    cut = tmp_path / "00003.tar"
    os.truncate(cut, cut.read_bytes().index(b"007.jpg"))
    load_captions("webdataset", pattern)
    read, index_shard = [], shards.index_shard

    def watched(path, root, keys):
        read.append(os.path.basename(path))
        return index_shard(path, root, keys)

    monkeypatch.setattr(shards, "in_parallel", lambda function, items: map(function, items))
    monkeypatch.setattr(shards, "index_shard", watched)
    write_tar(tmp_path / "00001.tar", [("new.jpg", JPEG), ("new.txt", b"new")])
    (tmp_path / "00000.tar").rename(tmp_path / "00009.tar")
    write_tar(tmp_path / "00000.tar", [])
    monkeypatch.setattr(shards, "BATCH", 2)
    pairs = load_captions("webdataset", tmp_path)  # with another one, and in two parts
    assert read == ["00000.tar", "00001.tar", "00009.tar"]
    texts = [pairs[i][1] for i in range(len(pairs))]
    assert texts == [[t] for t in ("new", "picture 5", "picture 6", "picture 0", "picture 1")]
    facts = arrow.read_facts(pairs.path)
    for index in tmp_path.glob("*.arrow"):
        index.unlink()
    afresh = load_captions("webdataset", tmp_path)
    assert facts == arrow.read_facts(afresh.path) and facts["damaged"].keys() >= {str(cut)}
    assert [afresh[i] for i in range(len(pairs))] == [pairs[i] for i in range(len(pairs))]
    read.clear()
    load_captions("webdataset", tmp_path, ("", "", "caption"))  # may have other rows
    assert len(read) == 5


@pytest.mark.parametrize(
    "own", [5, {"x": 5}, {"x": {"kept": "1"}}, {"x": {"kept": 1, "lost": []}}, {}, None]
)
def test_indices_by_a_strangers_hand_are_passed_over(tmp_path, own):
    pattern = write_shards(tmp_path, [2])
    batch = pa.record_batch([["a.jpg"], [["theirs"]]], arrow.SCHEMA)
    arrow.write_arrow(tmp_path / "00000.tar.older.arrow", [batch], {"shards": own})
    (tmp_path / "00000.tar.damaged.arrow").write_bytes(b"ARROW1")
    assert [texts for *_, texts in rows_of(pattern)] == [["picture 0"], ["picture 1"]]
