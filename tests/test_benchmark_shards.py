"""benchmark.py shards on a few small shards: what is read, and what blocks would be fetched."""

import re

import numpy as np

import datasets
from benchmarks import shards


def test_orders_are_measured_beside_webdataset(tmp_path, capsys):
    paths = shards.write_shards(tmp_path, 4, 5, pictures=2)
    pairs = shards.measure_index(tmp_path, paths)
    assert len(pairs) == 20 and pairs.lengths == [5] * 4
    shards.measure_reading(pairs, paths, 20, 1)
    out = capsys.readouterr().out
    assert "index of 4 shards of 5 samples" in out and "10,000 shards of 10,000 samples: " in out
    rows = re.findall(r"^  (\w+(?: \d+)?) +\d+ +\d+ +[\d.]+ +([\d.]+)$", out, re.MULTILINE)
    names = ["uniform", "window 1", "window 4", "window 16", "webdataset"]
    assert [name for name, _ in rows] == names
    assert all(1 <= float(reads) < 1.5 for _, reads in rows[:4])  # of each image, and a few more


def test_blocks_that_storage_would_fetch():
    """Each once in order, each image's own if no other stays, each once in a window that fits."""
    shard_of, place = np.repeat(np.arange(4), 10), np.tile(np.arange(10) * 50, 4)

    def fetched(order, cache):
        return shards.blocks_fetched(np.asarray(order), shard_of, place, 100, cache) // 100

    assert fetched(range(40), 100) == 20
    spread = np.arange(40).reshape(4, 10).T.ravel()  # one image of each shard in turn
    assert fetched(spread, 100) == 40 and fetched(spread, 400) == 20
    windows = datasets.window_order([10] * 4, 2)(np.random.default_rng(0))
    assert fetched(windows, 1000) == 20 < fetched(windows, 300)
