"""The commands data, open and features of benchmark.py: reading, and features."""

import multiprocessing
import os
import pickle
import platform
import random
import resource
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import captions
import datasets
import features
import models
from benchmarks.archived import ArchivedDataset, ArchivedLoader, read_archived
from decoding import decode_image
from infra.archives import open_archive, read_file
from preprocessing import Preprocessing
from tokenizer import SimpleTokenizer

CPU = torch.device("cpu")
FORM = Preprocessing(image_size=224)
SIZE = FORM.image_size
WIDTH, HEIGHT = 500, 375  # of the pictures read
BATCH = 64


def machine():
    """The processor, the cores and the versions that figures depend on, in one line."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    system = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{system}, {versions}, pillow {PIL.__version__}"


def timed(function, *args):
    """(seconds, result) of function(*args)."""
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result


def compare(runs, rounds, warm_up=1):
    """{name: median rate} of several runs, measured in turn.

    Args:
        runs: {name: function that does some work and returns its units per second}.
        rounds: calls of each that count.
        warm_up: calls of each before these.
    """
    rates = {name: [] for name in runs}
    for _ in range(warm_up + rounds):
        for name, run in runs.items():
            rates[name].append(run())
    return {name: median(values[warm_up:]) for name, values in rates.items()}


def print_rates(rates, base, unit):
    """A line per rate, with its ratio to the rate named `base`."""
    width = max(map(len, rates))
    for name, rate in rates.items():
        digits = 0 if rate >= 100 else 2
        print(f"  {name:{width}}  {rate:8.{digits}f} {unit}  {rate / rates[base]:6.2f} x")


def in_process(function, *args):
    """(result, peak memory in GB) of function(*args) in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_memory, function, *args).result()


def with_memory(function, *args):
    return function(*args), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ---------------------------------------------------------------------------------------------
# data: from files to batches


def make_picture(seed):
    """A JPEG with edges, smooth parts and noise, about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=int)
    pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_pictures(root, number, zips=4):
    """Pictures, their metadata as .csv, and zips of a thousand of them in YFCC's layout."""
    pictures = [make_picture(i) for i in range(number)]
    for i, data in enumerate(pictures):
        (root / f"{i:05d}.jpg").write_bytes(data)
    text = "a photograph of a market in an old town, taken on a rainy afternoon in autumn"
    rows = "".join(f'{i:05d}.jpg,"{text}"\n' for i in range(number))
    (root / "pairs.csv").write_text(f"filepath,title\n{rows}")
    (root / "images/00").mkdir(parents=True)
    for z in range(zips):
        with zipfile.ZipFile(root / f"images/00/{z:03d}.zip", "w") as archive:
            for i in range(1000):
                archive.writestr(f"{i:03d}.jpg", pictures[i % number])


class DecodedDataset(Dataset):
    """Reads and decodes an image, and does nothing else: a bound for every loader."""

    def __init__(self, pairs, root):
        self.pairs, self.root = pairs, root

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, _ = self.pairs[index]
        return decode_image(read_file(self.root, path), path).size


def open_loaders(pairs, root, views, workers):
    """{name: loader}; all read the same pairs, and start(epoch) gives their batches."""
    tokenizer = SimpleTokenizer()
    dataset = ArchivedDataset(pairs, root, views, tokenizer, SIZE)
    loaders = {"archived": ArchivedLoader(dataset, BATCH, workers, CPU)}
    for augment in ("cpu", "device"):
        dataset = datasets.CaptionDataset(pairs, root, views, FORM, augment=augment)
        loaders[f"--augment {augment}"] = datasets.open_loader(
            dataset, BATCH, workers, CPU, collate_fn=datasets.Collate(tokenizer)
        )
    decoded = DecodedDataset(pairs, root)
    return loaders | {"bare decode": ArchivedLoader(decoded, BATCH, workers, CPU, collate_fn=list)}


def samples_per_second(loader):
    batches = loader.start(0)
    next(batches)  # its workers have started
    seconds, number = timed(lambda: sum(1 for _ in batches))
    return BATCH * number / seconds


def read_ours(root, names, stay_open=True):
    """Decodes images in zips."""
    for name in names:
        if not stay_open:
            open_archive.cache_clear()
        decode_image(read_file(root, name), name)


def images_per_second(read, root, names):
    seconds, _ = timed(read, root, names)
    return len(names) / seconds


def compare_loaders(pairs, root, args):
    for method in (models.CLIP, models.SIMCLR, models.SLIP):
        loaders = open_loaders(pairs, root, method.views, args.workers)
        runs = {name: partial(samples_per_second, loader) for name, loader in loaders.items()}
        print(method.__name__)
        print_rates(compare(runs, args.rounds), "archived", "samples/s")
        for name, loader in loaders.items() if args.workers else ():
            print(f"  {name:16}  {worker_memory(loader):8.0f} MB of its own in a worker")


class Ready(Dataset):
    """Samples that are in memory already, over and over."""

    def __init__(self, samples, number):
        self.samples, self.number = samples, number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return self.samples[index % len(self.samples)]


def seconds_a_batch(dataset, workers, collate):
    batches = iter(DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate))
    next(batches)  # its worker has started
    seconds, number = timed(lambda: sum(1 for _ in batches))
    return seconds / number


def compare_hand_over(pairs, root, args):
    """The time to make a SLIP batch, and to hand it over: from a worker, less its collation."""
    collate = datasets.Collate(SimpleTokenizer())
    print(f"A SLIP batch of {BATCH}, handed over by a worker")
    for augment in ("cpu", "device"):
        dataset = datasets.CaptionDataset(pairs, root, models.SLIP.views, FORM, augment=augment)
        ready = Ready([dataset[0, [i]] for i in range(BATCH)], 16 * BATCH)
        made = datasets.open_loader(dataset, BATCH, 0, CPU, collate_fn=collate)
        seconds = compare(
            {
                "make": lambda made=made: BATCH / samples_per_second(made),
                "collate": partial(seconds_a_batch, ready, 0, collate),
                "receive": partial(seconds_a_batch, ready, 1, collate),
            },
            args.rounds,
        )
        made, handed = seconds["make"], seconds["receive"] - seconds["collate"]
        print(
            f"  --augment {augment:6}  {1e3 * handed:8.1f} ms, {handed / made:.1%} of the "
            f"{1e3 * made:.1f} ms that making it takes"
        )


def compare_zips(root, args):
    rng = np.random.default_rng(0)
    archives, members = rng.integers(4, size=400), rng.integers(1000, size=400)
    names = [f"images/00/{z:03d}.zip/{i:03d}.jpg" for z, i in zip(archives, members, strict=True)]
    readers = {
        "archived": read_archived,
        "archives kept open": read_ours,
        "each archive new": partial(read_ours, stay_open=False),
    }
    runs = {name: partial(images_per_second, read, root, names) for name, read in readers.items()}
    print("Decoded from zips of 1,000 images")
    print_rates(compare(runs, args.rounds), "archived", "images/s")


def benchmark_data(args):
    """Samples per second from JPEG files to batches, and images per second from zips."""
    torch.set_num_threads(1)
    processes = f"{args.workers} loader workers" if args.workers else "one process"
    print(f"data: {WIDTH} x {HEIGHT} JPEGs, {processes}, median of {args.rounds} rounds")
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root, args.samples)
        pairs = captions.load_captions("csv", root / "pairs.csv")
        compare_loaders(pairs, root, args)
        compare_hand_over(pairs, root, args)
        compare_zips(root, args)


# ---------------------------------------------------------------------------------------------
# open: metadata


def write_pickle(path, number):
    """Metadata in YFCC15M's archived form, with titles and descriptions of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n % 8 + 2)) for n in range(20_000)]
    rows = [
        (6 * i, " ".join(rng.choices(words, k=4)), " ".join(rng.choices(words, k=12)))
        for i in range(number)
    ]
    with open(path, "wb") as file:
        pickle.dump(rows, file, protocol=4)


def count_pairs(metadata):
    return len(captions.load_captions("yfcc15m", metadata))


class RandomReads(Dataset):
    """An item reads a pair and tokenizes a caption; its value is the worker's memory in MB."""

    def __init__(self, pairs):
        self.pairs, self.tokenizer = pairs, SimpleTokenizer()

    def __getitem__(self, index):
        _, texts = self.pairs[index]
        self.tokenizer(texts[0])
        return process_memory() if index % 100 == 0 else (0.0, 0.0)


def worker_memory(loader):
    """The most private memory in MB that a worker of a loader with persistent workers has."""
    workers = loader.loader._iterator._workers
    return max(process_memory(worker.pid)[0] for worker in workers)


def process_memory(process="self"):
    """(private, mapped) memory of a process, by its number, in MB.

    private: pages that belong to this process alone. mapped: pages of files that no other process
    maps at the moment. The system takes the latter back if memory is short.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    fields = {name: value for name, value, *_ in (line.split() for line in lines[1:])}
    return tuple(int(fields[name]) / 1e3 for name in ("Private_Dirty:", "Private_Clean:"))


def read_at_random(metadata, workers, reads):
    """The largest process_memory of loader workers that each read `reads` random pairs."""
    pairs = captions.load_captions("yfcc15m", metadata)
    order = np.random.default_rng(0).integers(len(pairs), size=workers * reads)
    loader = DataLoader(
        RandomReads(pairs),
        1000,
        sampler=order.tolist(),
        num_workers=workers,
        multiprocessing_context="fork",  # as on Linux; by default a spawned process spawns
    )
    return np.max([np.max(batch, axis=1) for batch in loader], axis=0)


def benchmark_open(args):
    """Seconds and memory to convert a pickle of pairs, to open it again, and to read from it."""
    print(f"open: metadata of {args.pairs:,} pairs\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        metadata = os.path.join(folder, "yfcc15m.pkl")
        in_process(write_pickle, metadata, args.pairs)
        print(f"  pickle                    {os.path.getsize(metadata) / 1e9:8.2f} GB")
        (seconds, _), memory = in_process(timed, count_pairs, metadata)
        print(f"  conversion                {seconds:8.1f} s, at most {memory:.2f} GB of memory")
        (seconds, number), memory = in_process(timed, count_pairs, metadata)
        print(f"  opening                   {seconds:8.3f} s, {number:,} pairs")
        (private, mapped), _ = in_process(read_at_random, metadata, args.workers, args.reads)
        print(
            f"  private memory a worker   {private:8.1f} MB, after {args.reads:,} random pairs in "
            f"each of {args.workers} workers\n"
            f"  file pages mapped alone   {mapped:8.1f} MB, in the cache that all processes share"
        )


# ---------------------------------------------------------------------------------------------
# features: classifiers on frozen features


def write_features(path, images, classes, width):
    """Random features (images, width) and, beside them, their labels (images,)."""
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (images, width))
    for start in range(0, images, 10_000):
        part = file[start : start + 10_000]
        part[:] = rng.normal(size=part.shape)
    np.save(f"{path}-labels.npy", rng.integers(0, classes, images))


def open_features(path):
    train, labels = np.load(path, mmap_mode="c"), np.load(f"{path}-labels.npy")
    return torch.from_numpy(train), torch.from_numpy(labels)


def time_knn(path, classes, queries):
    train, labels = open_features(path)
    arguments = train, labels, train[:queries], labels[:queries], classes, (20, 200), 0.07, CPU
    return timed(features.knn_rankings, *arguments)[0]


def time_logistic(path, classes, iterations):
    train, labels = open_features(path)

    def fit():
        rows = torch.arange(len(train))
        features.LogisticRegression(train, labels, rows, classes, CPU).fit(1.0, max_iter=iterations)

    return timed(fit)[0]


def benchmark_features(args):
    """Seconds and memory of k-NN and logistic regression on a file of features."""
    print(f"features: {args.images:,} x {args.width}, {args.classes} classes\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = os.path.join(folder, "features.npy")
        in_process(write_features, path, args.images, args.classes, args.width)
        print(f"  on disk               {os.path.getsize(path) / 1e9:8.2f} GB")
        for name, function, number, unit in (
            ("k-NN", time_knn, args.queries, "queries"),
            ("logistic regression", time_logistic, args.iterations, "iterations"),
        ):
            seconds, memory = in_process(function, path, args.classes, number)
            print(
                f"  {name:20}  {seconds:8.1f} s for {number} {unit}, at most {memory:.2f} GB of "
                "memory, mapped file included"
            )
