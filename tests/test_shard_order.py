"""The order of samples from shards: every one once, by seed and epoch alone, window by window."""

import numpy as np
import pytest
import torch
from helpers import assert_equal, encoded, step_losses, train, weights, write_shards, write_tar

import datasets
from captions import load_captions
from datasets import CaptionDataset, EpochSampler, uniform_order, window_order
from preprocessing import Preprocessing
from tokenizer import SimpleTokenizer

LENGTHS = [(10, 10, 10, 3), (10,) * 5]


def draw(order, *seed):
    return order(np.random.default_rng(seed)).tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7])
def test_each_window_is_that_many_whole_shards(window):
    lengths = [4, 7, 1, 5, 5, 3]
    shard_of = np.repeat(np.arange(6), lengths)
    orders = [draw(window_order(lengths, window), 3, epoch) for epoch in range(30)]
    for order in orders:
        assert sorted(order) == list(range(25))
        whole = set()  # numbers of shards after which each one is at its end
        for at in range(1, 26):
            begun = set(shard_of[order[:at]])
            if sum(lengths[shard] for shard in begun) == at:
                whole.add(len(begun))
        assert whole >= set(range(window, 7, window))
    assert len({tuple(order) for order in orders}) == 30
    with_empty = draw(window_order([0, 2, 0, 3, 0], window), 3)
    assert sorted(with_empty) == list(range(5))


def test_the_order_within_a_window_is_uniform():
    """Each sample of one window has every place as often, and neighbours do not stay together."""
    order = window_order([4, 4], 2)
    places = np.array([draw(order, 0, epoch) for epoch in range(4000)])
    for place in range(8):
        counts = np.bincount(places[:, place], minlength=8)
        assert np.all(abs(counts - 500) < 5 * (4000 / 8 * 7 / 8) ** 0.5)
    together = (np.diff(places, axis=1) == 1).sum(axis=1).mean()
    assert abs(together - 7 * 7 / 56) < 0.1


@pytest.mark.parametrize("lengths, window", [([33], 16), ([10, 10, 13], 0), ([33], 0)])
def test_without_a_window_the_order_is_that_of_any_other_set(lengths, window):
    expected = np.random.default_rng((5, 2)).permutation(33).tolist()
    assert draw(window_order(lengths, window), 5, 2) == expected
    assert draw(uniform_order(33), 5, 2) == expected
    keys = list(EpochSampler(33, 3, 11, 0, 1, seed=5).keys(2))
    assert [indices[0] for _, indices in keys] == expected


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    root, lengths = tmp_path_factory.mktemp("shards"), LENGTHS[request.param]
    pairs = load_captions("webdataset", write_shards(root, lengths))
    assert pairs.lengths == list(lengths)
    form = Preprocessing(image_size=32)
    return pairs, CaptionDataset(pairs, pairs.root, ("image", "text"), form, seed=7)


def open_loaders(opened, monkeypatch, ranks, workers, batch_size, window=2):
    pairs, dataset = opened
    collate, loaders = datasets.Collate(SimpleTokenizer()), []
    for rank in range(ranks):
        monkeypatch.setattr(datasets, "get_world_size", lambda: ranks)
        monkeypatch.setattr(datasets, "get_rank", lambda rank=rank: rank)
        order = window_order(pairs.lengths, window)
        device = torch.device("cpu")
        loaders.append(
            datasets.open_loader(dataset, batch_size, workers, device, 1, collate, order)
        )
    return loaders


def names_of(batches):
    return [source["path"] for batch in batches for source in batch["sources"]]


CASES = [(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 1, 2), (0, 2, 2), (0, 3, 2)]
CASES += [(1, 1, 4), (1, 2, 4), (1, 3, 4)]  # each number of ranks with each of workers, once


@pytest.mark.parametrize("opened, ranks, workers", CASES, indirect=["opened"])
def test_each_sample_once_an_epoch(opened, monkeypatch, ranks, workers):
    """With more ranks x workers than shards; an epoch has whole batches, as of any other set."""
    total, batch_size = len(opened[0]), {1: 6, 2: 3, 3: 2}[ranks]
    loaders = open_loaders(opened, monkeypatch, ranks, workers, batch_size)
    parts = [[list(loader.start(4)), list(loader.start(4, 3))] for loader in loaders]
    names = [name for whole, _ in parts for name in names_of(whole)]
    assert len(names) == len(set(names)) == total - total % 6
    for whole, rest in parts:  # from an update on
        assert_equal(rest, whole[3:])
    # The same global batches for any number of ranks and workers, and in another run.
    monkeypatch.undo()
    (alone,) = open_loaders(opened, monkeypatch, 1, 0, 6)
    for step, batch in enumerate(alone.start(4)):
        views = [whole[step]["image"] for whole, _ in parts]
        assert torch.equal(torch.cat(views), batch["image"])
        assert [n for whole, _ in parts for n in names_of(whole[step : step + 1])] == names_of(
            [batch]
        )


def test_a_bad_image_is_replaced_by_the_next_of_the_order(tmp_path, monkeypatch):
    members = [("a.jpg", encoded(0)), ("a.txt", b"a"), ("b.jpg", b"no image"), ("b.txt", b"b")]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("c.jpg", encoded(1)), ("c.txt", b"c")])
    pairs = load_captions("webdataset", tmp_path)
    dataset = CaptionDataset(pairs, pairs.root, ("image", "text"), Preprocessing(image_size=32))
    order = draw(window_order(pairs.lengths, 1), 0, 0)
    (loader,) = open_loaders((pairs, dataset), monkeypatch, 1, 0, 1, window=1)
    found = list(loader.start(0))
    bad = order.index(1)
    for step, batch in enumerate(found):
        index = order[(step + 1) % 3] if step == bad else order[step]
        assert batch["sources"][0]["path"] == pairs[index][0]
    assert "0.tar/b.jpg@" in found[bad]["bad"][0]


# --- trainings ----------------------------------------------------------------------------------


def train_on_shards(tiny, folder, pattern, *extra):
    flags = ["--dataset", "webdataset", "--metadata", pattern, "--root", "", *extra]
    train(tiny, folder, *flags, model="CLIP_NANO8", val="none")


def test_two_runs_on_shards_are_equal(tiny, tmp_path):
    pattern = write_shards(tmp_path / "s", [10, 10, 10, 3])
    for name, workers in (("a", 0), ("b", 4)):
        extra = ["--batch-size", 8, "--seed", 3, "--shuffle-window", 2, "--workers", workers]
        train_on_shards(tiny, tmp_path / name, pattern, *extra)
    assert len(step_losses(tmp_path / "a")) == 4
    assert step_losses(tmp_path / "a") == step_losses(tmp_path / "b")
    assert_equal(weights(tmp_path / "a")["state_dict"], weights(tmp_path / "b")["state_dict"])
