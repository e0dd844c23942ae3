"""Shards as streams: commands and URLs, their members, commands that fail, and bad input."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import encoded, write_shards, write_tar

import datasets
import lanes
import stream_shards
from preprocessing import Preprocessing
from tokenizer import SimpleTokenizer
from utils import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(stream_shards, "PAUSE", 0)


def open_stream(metadata, samples=None, factors="", keys=(), is_resampled=False):
    return stream_shards.open_stream("webdataset", metadata, keys, samples, is_resampled, factors)


def open_loader(stream, batch_size, workers=0, seed=3):
    form = Preprocessing(image_size=32)
    dataset = lanes.StreamDataset(stream, ("image", "text"), form, seed)
    collate = datasets.Collate(SimpleTokenizer())
    return lanes.open_loader(dataset, batch_size, workers, CPU, 1, collate)


def captions_of(batches):
    return [int(s["caption"].split()[1]) for batch in batches for s in batch["sources"]]


def bad_of(batches):
    return [reason for batch in batches for reason in batch["bad"]]


def pairs_of(metadata, *keys):
    """[(name of the member, image, captions)] of a shard; or reasons."""
    found = stream_shards.read_shard(metadata, keys)
    return [x if isinstance(x, str) else (x[0].rpartition("/")[2], *x[1:]) for x in found]


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
        ("g.jpg", jpeg),
        ("g.png", png),
        ("g.txt", b"first"),
        ("g.txt", b"second"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    lost = ["d is without a caption", "e is without an image"]
    lost += ["g has 2 members of a kind that came before"]
    a, c = ("a.b", jpeg, ["dots"]), ("c", png, ["text"])
    for command in (f"pipe:cat {path}", f"pipe:gzip -c {path}"):
        told = [f"{command}/{text}" for text in lost]
        assert pairs_of(command) == [a, c, *told, ("g", jpeg, ["first"])]
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
    assert all("00002.tar failed 3 times after 0 pairs: exit code 22" in x for x in bad_of(batches))
    assert len(bad_of(batches)) in (2, 4)  # as many as one has of 4 samples, or as the other has


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


def test_a_command_that_succeeds_at_last_costs_nothing(tmp_path, capsys):
    """But the reader of the log learns why it waited."""
    command = "if mkdir {log}2; then " + HALF + "; exit 3; else cat {tar}; fi"
    batches = broken(tmp_path, command)
    assert sorted(captions_of(batches)) == list(range(12)) and not bad_of(batches)
    assert (tmp_path / "log").read_text() == "x\nx\n"
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: pipe:echo x") and note.endswith(
        "failed after 2 pairs: exit code 3; it is tried again"
    )


@pytest.mark.parametrize("number", [1, 20, 39])
def test_a_damaged_header_is_noticed(tmp_path, number):
    """webdataset takes it for the end of the tar."""
    write_shards(tmp_path, [40])
    path = tmp_path / "00000.tar"
    data = bytearray(whole := path.read_bytes())
    data[data.index(b"%03d.txt" % number)] ^= 1
    path.write_bytes(data)
    with pytest.raises(stream_shards.Lost, match="a header is damaged"):
        list(stream_shards.read_shard(str(path), ()))
    path.write_bytes(whole + whole)
    with pytest.raises(stream_shards.Lost, match="there is data behind its end mark"):
        list(stream_shards.read_shard(str(path), ()))


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
