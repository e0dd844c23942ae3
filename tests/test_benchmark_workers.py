"""benchmark.py workers: whose memory is counted as a worker's own, and each loader's batches."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmarks import data, shards, workers


def touch(block, pipe):
    """In a process that shares `block` (MB): writes to half of it, and tells its memory."""
    before = workers.memory_of("self")
    block[: len(block) // 2] += 1
    pipe.send((before, workers.memory_of("self")))


def test_pages_are_a_workers_own_once_it_writes_to_them():
    block, (mine, theirs) = torch.ones(200, 250_000), multiprocessing.Pipe()  # 200 MB
    process = multiprocessing.get_context("fork").Process(target=touch, args=(block, theirs))
    process.start()
    before, after = mine.recv()
    process.join()
    assert after["own"] - before["own"] == pytest.approx(100, abs=20)
    assert after["resident"] - before["resident"] < 20 < after["own"] < after["share"]


def test_each_loader_gives_batches(tmp_path, monkeypatch):
    for module in (data, shards, workers):
        monkeypatch.setattr(module, "BATCH", 4)
    data.write_pictures(tmp_path, 8, zips=0)
    shards.write_shards(Path(tmp_path), 2, 4, pictures=2)
    for name, open_loader in workers.LOADERS.items():
        batch = next(open_loader(str(tmp_path), 0).start(0))
        assert batch["image"].shape == (4, 3, 224, 224) and len(batch["text"]) == 4, name
