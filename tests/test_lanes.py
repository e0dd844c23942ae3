"""The order of streams of shards: by seed, lanes and epoch, resumed at any place; trainings."""

from collections import Counter
from itertools import chain, islice

import lives
import numpy as np
import pytest
import torch
from helpers import assert_equal, encoded, rows, train, train_flags, write_shards, write_tar
from test_resume import assert_same_run
from test_stream_shards import bad_of, captions_of, open_loader, open_stream

import datasets
import lanes
from infra.run import Run
from preprocessing import Preprocessing
from stream_shards import Stream
from utils import InputError


def set_ranks(monkeypatch, number, rank):
    for module in (datasets, lanes):
        monkeypatch.setattr(module, "get_world_size", lambda: number)
        monkeypatch.setattr(module, "get_rank", lambda: rank)


@pytest.mark.parametrize(
    "lengths, ranks, workers",
    [((10,) * 4, 1, 0), ((10,) * 4, 1, 2), ((10,) * 4, 2, 0), ((10,) * 4, 2, 2), ((20,) * 2, 2, 2)],
)
def test_each_sample_once_an_epoch(tmp_path, monkeypatch, capsys, lengths, ranks, workers):
    """The last case has more lanes than shards, each of half a shard."""
    stream = open_stream("pipe:cat " + write_shards(tmp_path, lengths), 40)
    epochs = []
    for epoch in (0, 1, 1):
        found = []
        for rank in range(ranks):
            set_ranks(monkeypatch, ranks, rank)
            found.append(list(open_loader(stream, 5, workers).start(epoch)))
        captions = [captions_of(batches) for batches in found]
        assert {len(batches) for batches in found} == {8 // ranks}
        assert sorted(chain.from_iterable(captions)) == list(range(40))
        assert not bad_of(chain.from_iterable(found))
        epochs.append((found, captions))
    assert_equal(epochs[1], epochs[2])  # two runs
    assert epochs[0][1] != epochs[1][1]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 2, 3, 7, 9, 16])
def test_shards_are_dealt_out(number):
    """Each to one lane, or in parts to several; anew in each epoch and turn."""
    stream = Stream(list("abcdefg"), None, [], 70)

    def deal(epoch, turn):
        return [[*lanes.Lane(stream, 0, epoch, i, number, 0).shards(turn)] for i in range(number)]

    for where in ((0, 0), (0, 1), (1, 0)):
        shares = list(chain.from_iterable(deal(*where)))
        parts = {url: parts for url, _, parts in shares}
        assert set(parts) == set(stream.urls)
        assert sorted(shares) == [(u, i, parts[u]) for u in stream.urls for i in range(parts[u])]
        assert max(parts.values()) - min(parts.values()) <= 1
    assert deal(0, 0) == deal(0, 0) and deal(0, 0) != deal(0, 1) != deal(1, 0) != deal(0, 0)


def test_a_bad_image_is_replaced_by_the_next_pair_and_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "BUFFER", 1)
    members = [m for i in range(6) for m in ((f"{i}.jpg", encoded(i)), (f"{i}.txt", b"x %d" % i))]
    members[2], members[4], members[11] = ("1.jpg", b""), ("2.jpg", b"no image"), ("5.cls", b"")
    write_tar(tmp_path / "a.tar", members)
    stream = open_stream(f"pipe:cat {tmp_path}/a.tar", 5)
    found = list(open_loader(stream, 1).start(0))
    assert captions_of(found) == [0, 3, 3, 3, 4]
    assert torch.equal(found[1]["image"], found[3]["image"])
    assert [len(batch["bad"]) for batch in found] == [0, 1, 1, 0, 0]
    # Two lanes in one shard: a pair that is dropped counts once.
    two = [lanes.Lane(stream, 0, 0, i, 2, 0) for i in range(2)]
    names = [[pair.name[-1] for pair in lane.read_part(0, *next(lane.shards(0)))] for lane in two]
    assert names == [["0", "2", "4"], ["1", "3"]]
    assert [len(lane.faults) for lane in two] == [1, 0]
    # A lost shard is as long as those that were whole, or else as the mean of the epoch's samples.
    for lane, lost in ((two[0], 3), (lanes.Lane(Stream(["x"], None, [], 9), 0, 0, 0, 1, 0), 7)):
        lane.faults = []
        lane.lose("pipe:x", 2, 1, "reason")
        assert len(lane.faults) == lost


def test_a_preview_is_the_start_of_the_first_epoch_and_ends_its_command(tmp_path):
    loader = open_loader(open_stream("pipe:cat " + write_shards(tmp_path, [8]), 8), 8)
    batch = loader.preview(5)
    assert loader.loader.dataset.lane is None
    (whole,) = loader.start(0)
    assert torch.equal(batch["image"], whole["image"][:5])


def test_lanes_by_far_more_than_shards(tmp_path):
    stream = open_stream("pipe:cat " + write_shards(tmp_path, [12] * 5), 60)
    form, found = Preprocessing(image_size=32), []
    for rank in range(3):
        dataset = lanes.StreamDataset(stream, ("image", "text"), form, 0)
        sampler = lanes.StreamSampler(2, 10, rank, 3, 5)
        found += [int(dataset[key]["text"].split()[1]) for key in sampler]
    assert sorted(found) == list(range(60))


def test_shards_of_more_and_fewer_samples_than_an_epoch(tmp_path, capsys):
    metadata = "pipe:cat " + write_shards(tmp_path, [10, 10, 10, 3])
    fewer = captions_of(open_loader(open_stream(metadata, 20), 5).start(0))
    assert len(set(fewer)) == 20 and not capsys.readouterr().out
    whole = captions_of(open_loader(open_stream(metadata, 33), 3).start(0))
    assert sorted(whole) == list(range(33)) and not capsys.readouterr().out
    more = captions_of(open_loader(open_stream(metadata, 40), 5).start(0))
    assert set(more[:33]) == set(range(33)) and len(set(more[33:])) == 7
    note = "note: shards of rank 0 hold fewer samples than its share of epoch 0; it reads others"
    assert capsys.readouterr().out.count(note) == 1


def test_the_buffer_shuffles_all_pairs_of_a_window():
    """Every item once; none comes before those that the buffer had no place for."""
    rng = np.random.default_rng(0)
    orders = [list(lanes.shuffled(range(20), rng, 6)) for _ in range(50)]
    for order in orders:
        assert sorted(order) == list(range(20))
        assert all(item < at + 6 for at, item in enumerate(order))
    assert len({tuple(order) for order in orders}) == 50
    assert {order[0] for order in orders} == set(range(6))


def test_draws_with_replacement_follow_the_factors(tmp_path):
    a, b = write_shards(tmp_path / "a", [2] * 3), write_shards(tmp_path / "b", [2])
    metadata = f"pipe:cat {a}::pipe:cat {b}"
    stream = open_stream(metadata, 40, "1::5", is_resampled=True)
    assert stream.weights == [1, 1, 1, 5]

    def draws(epoch, lane, number=4000):
        shards = lanes.Lane(stream, 0, epoch, lane, 2, 0).shards(0)
        return [stream.urls.index(url) for url, *_ in islice(shards, number)]

    first, counts = draws(0, 0), Counter(draws(0, 0))
    for shard, weight in enumerate(stream.weights):
        p = weight / 8
        assert abs(counts[shard] - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5
    assert first == draws(0, 0)
    assert len({tuple(draws(*where, 50)) for where in ((0, 0), (0, 1), (1, 0))}) == 3
    equal = Counter(open_stream(metadata, 40, is_resampled=True).weights)
    assert equal == {1: 4}


def test_a_resampled_epoch_is_resumed_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lanes, "BUFFER", 4)
    metadata = "pipe:cat " + write_shards(tmp_path, [3, 3])
    loader = open_loader(open_stream(metadata, 24, is_resampled=True), 4)
    whole = list(loader.start(2))
    assert len(captions_of(whole)) == 24 and not capsys.readouterr().out
    assert_equal(list(loader.start(2, 4)), whole[4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_at_every_batch_with_bad_images_and_commands(tmp_path, monkeypatch, workers):
    """What was consumed is not decoded, and its faults are not counted again."""
    monkeypatch.setattr(lanes, "BUFFER", 3)
    members = [
        member for i in range(8) for member in ((f"{i}.jpg", encoded(i)), (f"{i}.txt", b"x"))
    ]
    for number in (1, 2, 3, 7):
        members[2 * number] = (f"{number}.jpg", b"no image")
    write_tar(tmp_path / "bad/bad.tar", members)
    pattern = write_shards(tmp_path, [8] * 3)
    half = f"pipe:head -c 9000 {tmp_path}/00000.tar"
    stream = open_stream(f"pipe:cat {pattern}::{half}::{tmp_path}/bad", 40)
    whole = list(open_loader(stream, 4, workers).start(1))
    bad = Counter(bad_of(whole))
    for number in (1, 2, 3, 7):
        name = f"{tmp_path}/bad/bad.tar/{number}"
        assert bad[f"image {name} is empty, or no image; replace or remove it"]
    assert any(text.startswith(half) and "it ends in the middle" in text for text in bad)
    decoded = []
    make = lanes.StreamDataset.make_views
    monkeypatch.setattr(
        lanes.StreamDataset, "make_views", lambda *args: decoded.append(1) or make(*args)
    )
    for batch in range(len(whole)):
        del decoded[:]
        rest = list(open_loader(stream, 4, workers).start(1, batch))
        assert_equal(rest, whole[batch:])
        assert len(decoded) <= 5 * 4 * len(rest)  # bad ones are followed by up to four more


# --- trainings ----------------------------------------------------------------------------------


def flags_of(metadata, *extra):
    return ["--dataset", "webdataset", "--metadata", metadata, "--root", "", *extra]


def test_a_training_stopped_at_every_update_equals_an_undisturbed_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "due", Run.due)  # comes back after the test
    metadata = "pipe:cat " + write_shards(tmp_path / "shards", [4, 4, 4, 4])
    extra = flags_of(metadata, "--train-num-samples", 16)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"model": "SIMCLR_NANO8", "val": "none", "epochs": 2}
    train(tiny, whole, *extra, **options)
    lives.stop_everywhere(tmp_path, "main", *train_flags(tiny, parts, *extra, **options))
    assert_same_run(parts, whole)
    assert [row["pairs"] for row in rows(parts)] == [16, 16]


def test_bad_samples_are_counted_and_bounded_and_lanes_are_recorded(tiny, tmp_path, capsys):
    pattern = write_shards(tmp_path / "shards", [4, 4, 4])
    options = {"model": "CLIP_NANO8", "val": "none"}
    extra = flags_of(f"pipe:cat {pattern}::pipe:exit 7", "--train-num-samples", 16)
    with pytest.raises(InputError, match="4 of the epoch's 16 samples cannot be read, more than"):
        train(tiny, tmp_path / "a", *extra, **options)
    extra += ["--max-bad-fraction", 0.6]
    train(tiny, tmp_path / "b", *extra, **options)
    assert rows(tmp_path / "b")[0]["bad_samples"] == 8  # it comes again in the second turn
    out = capsys.readouterr().out  # of both runs
    assert out.count("pipe:exit 7 failed 3 times after 0 pairs") == 2
    train(tiny, tmp_path / "b", *extra, "--workers", 2, **options | {"epochs": 2})
    note = "was that of a stream by 1 ranks x 1 workers, now it is that of a stream by 1 ranks x 2"
    assert note in capsys.readouterr().out
