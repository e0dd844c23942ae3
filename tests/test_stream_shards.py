"""Shards as streams: commands and URLs, their order and resumption, and commands that fail."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice

import lives
import numpy as np
import pytest
import torch
from helpers import assert_equal, encoded, rows, train, train_flags, write_shards, write_tar
from test_resume import assert_same_run

import datasets
import lanes
import stream_shards
from infra.run import Run
from preprocessing import Preprocessing
from tokenizer import SimpleTokenizer
from utils import InputError

CPU = torch.device("cpu")


def open_stream(metadata, samples=None, factors="", keys=(), is_resampled=False):
    return stream_shards.open_stream("webdataset", metadata, keys, samples, is_resampled, factors)


def open_loader(stream, batch_size, workers=0, seed=3):
    form = Preprocessing(image_size=32)
    dataset = lanes.StreamDataset(stream, ("image", "text"), form, seed)
    collate = datasets.Collate(SimpleTokenizer())
    return lanes.open_loader(dataset, batch_size, workers, CPU, 1, collate)


def set_ranks(monkeypatch, number, rank):
    for module in (datasets, lanes):
        monkeypatch.setattr(module, "get_world_size", lambda: number)
        monkeypatch.setattr(module, "get_rank", lambda: rank)


def captions_of(batches):
    return [int(s["caption"].split()[1]) for batch in batches for s in batch["sources"]]


def bad_of(batches):
    return [reason for batch in batches for reason in batch["bad"]]


def pairs_of(metadata, *keys):
    """[(name of the member, image, captions)] of a shard; or reasons."""
    found = stream_shards.read_shard(metadata, keys)
    return [x if isinstance(x, str) else (x[0].rpartition("/")[2], *x[1:]) for x in found]


# --- the order ----------------------------------------------------------------------------------


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


# --- reading ------------------------------------------------------------------------------------


def test_members_of_every_kind(tmp_path):
    jpeg, png = encoded(0), encoded(1, "PNG")
    members = [
        ("./a.b.JPG", jpeg),
        ("./a.b.txt", b"dots"),
        ("._c.jpg", b"Mac"),
        ("c.json", b'{"alt": ["one", "two"]}'),
        ("c.png", png),
        ("c.txt", b"text"),
        ("d.jpg", jpeg),
        ("e.txt", b"text"),
        ("f.cls", b"7"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    lost = ["d is without a caption", "e is without an image"]
    a, c = ("a.b", jpeg, ["dots"]), ("c", png, ["text"])
    for command in (f"pipe:cat {path}", f"pipe:gzip -c {path}"):
        assert pairs_of(command) == [a, c, *(f"{command}/{text}" for text in lost)]
    assert pairs_of(f"pipe:cat {path}", "alt")[:2] == [a, ("c", png, ["one", "two"])]
    assert pairs_of(str(path))[:2] == [a, c]  # a file beside streams


def test_shards_of_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    write_shards(tmp_path, [4, 4])
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        batches = list(open_loader(open_stream(url + "{00000..00001}.tar", 8), 4).start(0))
        assert sorted(captions_of(batches)) == list(range(8)) and not bad_of(batches)
        batches = list(open_loader(open_stream(url + "{00001..00002}.tar", 4), 4).start(0))
        server.shutdown()
    assert sorted(captions_of(batches)) == [4, 5, 6, 7]


# --- faults -------------------------------------------------------------------------------------


def broken(tmp_path, command):
    """Batches of two shards of 6 samples, the second of which is read by a command."""
    write_shards(tmp_path, [6, 6])
    second = command.format(tar=tmp_path / "00001.tar", log=tmp_path / "log")
    stream = open_stream(
        f"pipe:cat {tmp_path}/00000.tar::pipe:echo x >> {tmp_path}/log; {second}", 12
    )
    return list(open_loader(stream, 3).start(0))


HALF = "head -c 9000 {tar}"  # in the middle of its fourth pair; the third is not sure to be over


@pytest.mark.parametrize(
    "command, kept, reason",
    [
        (HALF + "; exit 3", 2, "after 2 pairs: exit code 3; about 4 samples are lost"),
        (HALF, 2, "after 2 pairs: it ends in the middle; about 4 samples"),
        ("cat {tar}; exit 1", 6, "after 6 pairs: exit code 1; about 1 samples are lost"),
        ("false", 0, "after 0 pairs: exit code 1; about 6 samples are lost"),
        ("true", 0, "after 0 pairs: it ends in the middle"),
        ("head -c 2560 /dev/urandom", 0, "after 0 pairs: no tar, or a damaged one"),
        ("head -c 10240 /dev/zero", 0, "after 0 pairs: it holds no sample"),
        (HALF + " && sleep 1000 | cat", 2, "after 2 pairs: no byte for 0.4 s"),
        ("cat {tar} && exec >&- && sleep 1000", 6, "after 6 pairs: no end for 0.4 s"),
    ],
)
def test_a_command_is_tried_thrice_and_what_it_lacks_is_bad(
    tmp_path, monkeypatch, command, kept, reason
):
    monkeypatch.setattr(stream_shards, "PATIENCE", 0.4)
    batches = broken(tmp_path, command)
    captions, bad = captions_of(batches), bad_of(batches)
    assert sorted(set(captions)) == [*range(6 + kept)]
    turns = 2 if kept < 6 else 1  # of the lane, to have 12 samples
    assert (tmp_path / "log").read_text() == "x\n" * 3 * turns
    assert all(f"failed 3 times {reason}" in text for text in bad)
    assert len(bad) == turns * max(6 - kept, 1)
    assert set(Counter(captions[: 6 + kept]).values()) == {1}  # a retry repeats none


def test_a_command_that_succeeds_at_last_costs_nothing(tmp_path):
    command = "if mkdir {log}2; then " + HALF + "; exit 3; else cat {tar}; fi"
    batches = broken(tmp_path, command)
    assert sorted(captions_of(batches)) == list(range(12)) and not bad_of(batches)
    assert (tmp_path / "log").read_text() == "x\nx\n"


def test_a_damaged_header_is_noticed(tmp_path):
    path = tmp_path / "00000.tar"
    write_shards(tmp_path, [40])
    data = bytearray(path.read_bytes())
    data[data.index(b"020.jpg")] ^= 1
    path.write_bytes(data)
    with pytest.raises(stream_shards.Lost, match="a damaged header"):
        list(stream_shards.read_shard(str(path), ()))


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


def test_a_set_without_a_sample_is_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        list(open_loader(open_stream("pipe:false {1..2}", 8), 4).start(0))
    line = str(error.value)
    assert line.startswith("2 shards in a row give no sample; check them; pipe:false ")
    assert line.endswith("failed 3 times after 0 pairs: exit code 1")
    members = [(f"{i:02d}.{kind}", b"x") for i in range(30) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match="20 samples in a row cannot be read; check the shards"):
        list(open_loader(open_stream(f"pipe:cat {path}", 8), 4).start(0))


def hold(queue):
    command = stream_shards.Command("pipe:sleep 1000 | sleep 1000")
    queue.put(command.process.pid)
    command.read(1)


def members_of_group(group):
    """Processes of a group that are not over, by /proc."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, pgrp = file.read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(name))
    return found


def test_no_command_outlives_its_reader(tmp_path):
    """Neither one that is closed nor one whose reader is killed."""
    command = stream_shards.Command("pipe:sleep 1000 | sleep 1000")
    group = command.process.pid
    assert members_of_group(group)
    command.close()
    while members_of_group(group):
        time.sleep(0.01)
    queue = multiprocessing.Queue()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(queue,))
    process.start()
    group = queue.get()
    assert members_of_group(group)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while members_of_group(group):
        time.sleep(0.01)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("pipe:cat a.tar",), "is a stream: train-num-samples is missing; give it"),
        (("s3://b/a.tar", 8), "s3://b/a.tar: unknown scheme s3; give an http.* or pipe:COMMAND"),
        (("pipe:cat a::gs://b", 8), "metadata gs://b: unknown scheme gs"),
        (("pipe:cat a::absent.tar", 8), "absent.tar matches no file"),
        (("pipe:cat {a,a}.tar", 8), "names pipe:cat a.tar twice"),
        (
            ("pipe:a::pipe:b", 8, "1", (), True),
            "factors 1: give a number above 0 for each of the 2",
        ),
        (("pipe:a::pipe:b", 8, "1::0", (), True), "factors 1::0: give a number above 0"),
        (("pipe:a::pipe:b", 8, "1::x", (), True), "factors 1::x: give a number above 0"),
        (("pipe:a::pipe:b", 8, "1::2"), "factors 1::2 need dataset-resampled; give it as well"),
        (("a.tar", 8), "metadata a.tar is no stream: leave out train-num-samples"),
    ],
)
def test_bad_input_is_one_line(arguments, match):
    with pytest.raises(InputError, match=match) as error:
        open_stream(*arguments)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(InputError, match="which needs the package webdataset; install it"):
        open_stream("pipe:cat a.tar", 8)


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
