"""The command shards of benchmark.py: indexing, and reading in several orders from a cold cache."""

import io
import json
import os
import resource
import tarfile
import tempfile
import time
from collections import OrderedDict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

import captions
import datasets
import lanes
import models
import stream_shards
from benchmarks.data import BATCH, CPU, FORM, machine, make_picture, timed
from infra.archives import read_file
from tokenizer import SimpleTokenizer

TEXT = "a photograph of a market in an old town, taken on a rainy afternoon in autumn"
WINDOWS = (1, 4, 16)
SHUFFLE = 5000  # samples in the buffer that open_clip gives webdataset


def write_shards(folder, shards, per_shard, pictures=256):
    """Tars as img2dataset writes them: .jpg, .json and .txt, with a pax header each."""
    images = [make_picture(i) for i in range(pictures)]
    for shard in range(shards):
        rng = np.random.default_rng(shard)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for i in range(per_shard):
                key = f"{shard:05d}{i:04d}"
                image = images[rng.integers(pictures)]
                facts = json.dumps({"caption": TEXT, "key": key, "url": "http://" + "x" * 600})
                members = {"jpg": image, "json": facts.encode(), "txt": TEXT.encode()}
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size, member.mtime = len(data), time.time()
                    archive.addfile(member, io.BytesIO(data))
    return sorted(map(str, folder.glob("*.tar")))


def evict(paths):
    """Takes files out of the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def traffic():
    """(bytes read from the disk, calls of read) of this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    fields = dict(line.split(": ") for line in lines)
    return np.array([int(fields["read_bytes"]), int(fields["syscr"])])


def cold(paths, function):
    """(seconds, bytes from the disk, calls of read, result) of a call that finds no file cached."""
    evict(paths)
    before = traffic()
    seconds, result = timed(function)
    return (seconds, *(traffic() - before).tolist(), result)


# ---------------------------------------------------------------------------------------------
# The index


def processor_seconds():
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure_index(folder, paths):
    """Prints the time of an index from a cold cache; returns its pairs."""
    evict(paths)
    before = processor_seconds()
    seconds, pairs = timed(captions.load_captions, "webdataset", folder)
    work = (processor_seconds() - before) / len(paths)
    rate, cores = len(paths) / seconds, len(os.sched_getaffinity(0))
    whole = 10_000 * 10_000 / len(pairs) * len(paths)  # such shards in 10,000 of 10,000 samples
    print(
        f"index of {len(paths)} shards of {len(pairs) // len(paths):,} samples, {cores} processes\n"
        f"  {rate:.2f} shards/s, {work:.3f} s of a core for each\n"
        f"  10,000 shards of 10,000 samples: {whole / rate / 60:.0f} minutes here, "
        f"{whole * work / 16 / 60:.0f} on 16 idle cores"
    )
    return pairs


# ---------------------------------------------------------------------------------------------
# Reading without decoding


def read_in_order(pairs, order):
    return sum(len(read_file(pairs.root, pairs[i][0])) for i in order.tolist())


def read_by_webdataset(paths, number):
    """The bytes of the images of so many samples, as open_clip's pipeline has them."""
    import webdataset

    samples = webdataset.WebDataset(paths, shardshuffle=100, empty_check=False).shuffle(SHUFFLE)
    used = 0
    for done, sample in enumerate(samples, start=1):
        used += len(sample["jpg"])
        if done == number:
            break
    return used


def measure_reading(pairs, paths, samples, rounds):
    """Prints images per second, and bytes from the disk, of a part of an epoch in each order."""
    lengths = pairs.lengths
    orders = {"uniform": datasets.window_order(lengths, 0)}
    orders |= {f"window {w}": datasets.window_order(lengths, w) for w in WINDOWS}
    runs = {
        name: partial(read_in_order, pairs, order(np.random.default_rng(0))[:samples])
        for name, order in orders.items()
    }
    runs["webdataset"] = partial(read_by_webdataset, paths, samples)
    results = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(cold(paths, run))
    print(f"\nreading {samples:,} images from a cold cache, one process, without decoding")
    print("                images/s   MB/s   bytes from disk / of images   reads / image")
    for name, found in results.items():
        seconds = median(row[0] for row in found)
        _, disk, calls, used = found[-1]
        print(
            f"  {name:12}  {samples / seconds:8.0f}  {used / seconds / 1e6:5.0f}  "
            f"{disk / used:19.2f}  {calls / samples:20.2f}"
        )


# ---------------------------------------------------------------------------------------------
# What storage that reads whole blocks would fetch


def blocks_fetched(order, shard_of, place, block, cache):
    """Bytes fetched by reading images in an order, in blocks of which `cache` bytes stay."""
    kept, fetched = OrderedDict(), 0
    for i in order.tolist():
        key = (shard_of[i], place[i] // block)
        if key in kept:
            kept.move_to_end(key)
            continue
        fetched += block
        kept[key] = True
        if len(kept) > cache // block:
            kept.popitem(last=False)
    return fetched


def compute_blocks(shards=1000, per_shard=10_000, size=43_000, block=2**20, cache=8 * 2**30):
    """Prints bytes fetched per byte used for windows, if storage and its cache have blocks."""
    print(
        f"\ncomputed: bytes fetched per byte used, {shards:,} shards of {per_shard:,} images of "
        f"{size // 1000} KB,\nif storage fetches blocks of {block >> 20} MB of which a node keeps "
        f"{cache >> 30} GB"
    )
    number = np.arange(shards * per_shard)
    shard_of, place = number // per_shard, number % per_shard * size
    for window in (1, 4, 16, 64, 0):
        order = datasets.window_order([per_shard] * shards, window)(np.random.default_rng(0))
        part = order[: max(window, 16) * per_shard]  # whole windows
        fetched = blocks_fetched(part, shard_of, place, block, cache)
        name = f"window {window}" if window else "uniform"
        print(f"  {name:12}  {fetched / (len(part) * size):8.2f}")


# ---------------------------------------------------------------------------------------------
# From shards to batches


class Peer:
    """webdataset's order of samples, and our views and captions of each."""

    def __init__(self, paths, dataset, workers, collate):
        self.paths, self.dataset, self.workers, self.collate = paths, dataset, workers, collate

    def __call__(self, sample):
        rng = np.random.default_rng(0)
        views = self.dataset.make_views(sample["jpg"], sample["__key__"], rng)
        return views | {"text": sample["txt"].decode(), "bad": [], "source": {}}

    def start(self, epoch):
        import webdataset

        split = {"nodesplitter": webdataset.split_by_node}
        samples = webdataset.WebDataset(self.paths, shardshuffle=100, empty_check=False, **split)
        full = samples.shuffle(SHUFFLE, initial=SHUFFLE)  # its buffer, before the first batch
        batches = full.map(self).batched(BATCH, collation_fn=self.collate)
        return iter(webdataset.WebLoader(batches, batch_size=None, num_workers=self.workers))


def measure_loading(pairs, paths, args):
    collate = datasets.Collate(SimpleTokenizer())
    dataset = datasets.CaptionDataset(pairs, pairs.root, models.CLIP.views, FORM)
    loaders = {"webdataset": Peer(paths, dataset, args.workers, collate)}
    for name, window in (("uniform", 0), ("window 16", 16)):
        order = datasets.window_order(pairs.lengths, window)
        options = BATCH, args.workers, CPU, 1, collate, order
        loaders[name] = datasets.open_loader(dataset, *options)
    commands = "::".join(f"pipe:cat {path}" for path in paths)
    stream = stream_shards.open_stream("webdataset", commands, [], len(pairs), False, "")
    streamed = lanes.StreamDataset(stream, models.CLIP.views, FORM)
    loaders["streamed"] = lanes.open_loader(streamed, BATCH, args.workers, CPU, 1, collate)
    rates = {name: [] for name in loaders}
    for epoch in range(args.rounds):
        for name, loader in loaders.items():
            evict(paths)
            batches = loader.start(epoch)
            next(batches)  # its workers have started, its buffer is filled
            seconds, number = timed(lambda b=batches: sum(1 for _ in islice(b, args.batches)))
            rates[name].append(BATCH * number / seconds)
            del batches
    print(f"\nCLIP samples/s from a cold cache, {args.workers} loader workers")
    for name, found in rates.items():
        print(f"  {name:12}  {median(found):8.0f}")


def benchmark_shards(args):
    """Speed of the index of tar shards, and of reading them in several orders."""
    print(f"shards: median of {args.rounds} rounds\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = write_shards(Path(folder), args.shards, args.per_shard)
        pairs = measure_index(folder, paths)
        samples = min(args.samples, len(pairs))
        measure_reading(pairs, paths, samples, args.rounds)
        measure_loading(pairs, paths, args)
    compute_blocks()
