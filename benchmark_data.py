"""The measurements of benchmark.py that train nothing: `data` reads images, `open` metadata.

The archived code's way of reading stands here for comparison.
"""

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
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as tv

import captions
import catalog
import eval_zeroshot
import features
import models
import utils
from datasets import CaptionDataset, Collate, EpochSampler
from evaluation import Evaluation
from infra import devices
from infra.archives import open_archive, read_file
from tokenizer import SimpleTokenizer
from transforms import MEAN, STD, decode_image

SIZE = 224  # pixels
WIDTH, HEIGHT = 500, 375  # of the pictures read
BATCH = 64


def machine():
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    system = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{system}, {versions}, pillow {PIL.__version__}"


def compare(runs, rounds, warm_up=1):
    """Calls each run() -> units per second, in turn, `rounds` times; the median of each.

    warm_up: further rounds before these, which do not count.
    """
    rates = {name: [] for name in runs}
    for _ in range(warm_up + rounds):
        for name, run in runs.items():
            rates[name].append(run())
    return {name: median(values[warm_up:]) for name, values in rates.items()}


def print_rates(rates, base, unit):
    width = max(map(len, rates))
    for name, rate in rates.items():
        digits = 0 if rate >= 100 else 2
        print(f"  {name:{width}}  {rate:8.{digits}f} {unit}  {rate / rates[base]:6.2f} x")


# ---------------------------------------------------------------------------------------------
# data: from files to batches


def make_picture(seed):
    """An encoded picture with edges, smooth parts and noise, about as large as a photograph's."""
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


class Blur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class ArchivedDataset(Dataset):
    """What the archived code does for a sample, {view: tensor}: PIL, float tensors, 77 tokens."""

    def __init__(self, pairs, root, views, tokenizer, size=SIZE):
        end = [tv.ToTensor(), tv.Normalize(MEAN, STD)]
        image = tv.Compose([tv.RandomResizedCrop(size, (0.5, 1.0)), *end])
        jitter = tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
        steps = [jitter, tv.RandomGrayscale(0.2), tv.RandomApply([Blur()], 0.5)]
        crop = tv.RandomResizedCrop(size, (0.08, 1.0))
        augment = tv.Compose([crop, *steps, tv.RandomHorizontalFlip(), *end])
        views_of = {"image": image, "aug1": augment, "aug2": augment}
        self.transforms = {view: views_of[view] for view in views if view != "text"}
        self.pairs, self.root = pairs, root
        self.tokenizer = tokenizer if "text" in views else None

    def __getitem__(self, key):
        _, (index, *_) = key
        path, texts = self.pairs[index]
        with open(self.root / path, "rb") as file:
            image = Image.open(file).convert("RGB")
        sample = {view: transform(image) for view, transform in self.transforms.items()}
        return sample | {"text": self.tokenizer(random.choice(texts))} if self.tokenizer else sample


class DecodedDataset(Dataset):
    """Nothing but reading and decoding."""

    def __init__(self, pairs, root):
        self.pairs, self.root = pairs, root

    def __getitem__(self, key):
        _, (index, *_) = key
        path, _ = self.pairs[index]
        return decode_image(read_file(self.root, path), path).size


def load(dataset, collate_fn, workers, samples):
    """Samples per second; without workers, in this process."""
    sampler = EpochSampler(samples, BATCH, samples // BATCH, 0, 1)
    loader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=collate_fn)
    batches = iter(loader)
    next(batches)  # workers have started
    started = time.perf_counter()
    done = sum(BATCH for _ in batches)
    return done / (time.perf_counter() - started)


def read_archived(root, names):
    """The archived code opens the archive, and so reads its directory, for every image."""
    for name in names:
        archive, _, member = name.partition(".zip/")
        with zipfile.ZipFile(root / f"{archive}.zip") as file:
            decode_image(file.read(member), name)


def read_ours(root, names, keep=True):
    for name in names:
        if not keep:
            open_archive.cache_clear()
        decode_image(read_file(root, name), name)


def rate_of(read, root, names):
    started = time.perf_counter()
    read(root, names)
    return len(names) / (time.perf_counter() - started)


def benchmark_data(args):
    torch.set_num_threads(1)
    where = f"{args.workers} loader workers" if args.workers else "one process"
    print(f"data: {WIDTH} x {HEIGHT} JPEGs, {where}, median of {args.rounds} rounds")
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root, args.samples)
        pairs, tokenizer = captions.load_captions("csv", root / "pairs.csv"), SimpleTokenizer()
        for method in (models.CLIP, models.SIMCLR, models.SLIP):
            common = (pairs, root, method.views)
            runs = {"archived": (ArchivedDataset(*common, tokenizer), default_collate)}
            for augment in ("cpu", "device"):
                ours = CaptionDataset(*common, SIZE, augment=augment)
                runs[f"--augment {augment}"] = ours, Collate(tokenizer)
            runs["bare decode"] = DecodedDataset(pairs, root), list
            measure = partial(load, workers=args.workers, samples=args.samples)
            calls = {k: partial(measure, d, c) for k, (d, c) in runs.items()}
            print(method.__name__)
            print_rates(compare(calls, args.rounds), "archived", "samples/s")

        rng = np.random.default_rng(0)
        names = [
            f"images/00/{z:03d}.zip/{i:03d}.jpg"
            for z, i in zip(rng.integers(4, size=400), rng.integers(1000, size=400), strict=True)
        ]
        calls = {
            "archived": partial(rate_of, read_archived, root, names),
            "archives kept open": partial(rate_of, read_ours, root, names),
            "each archive new": partial(rate_of, partial(read_ours, keep=False), root, names),
        }
        print("Decoded from zips of 1,000 images")
        print_rates(compare(calls, args.rounds), "archived", "images/s")


# ---------------------------------------------------------------------------------------------
# open: metadata


def in_process(function, *args):
    """function(*args) in a new process, and the peak memory of that process in GB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_memory, function, *args).result()


def with_memory(function, *args):
    return function(*args), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write_pickle(path, number):
    """Metadata in YFCC15M's archived form, titles and descriptions of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n % 8 + 2)) for n in range(20_000)]
    rows = [
        (6 * i, " ".join(rng.choices(words, k=4)), " ".join(rng.choices(words, k=12)))
        for i in range(number)
    ]
    with open(path, "wb") as file:
        pickle.dump(rows, file, protocol=4)


def timed(function, *args):
    """(seconds, what the function returned as a length)"""
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, len(result)


class RandomReads(Dataset):
    """An item reads a random pair and tokenizes a caption; it is the worker's memory in MB."""

    def __init__(self, pairs):
        self.pairs, self.tokenizer = pairs, SimpleTokenizer()

    def __getitem__(self, index):
        _, texts = self.pairs[index]
        self.tokenizer(texts[0])
        return memory_of_process() if index % 100 == 0 else (0.0, 0.0)


def memory_of_process():
    """MB that are this process's alone, and MB of files' pages that only it has mapped just now.

    The latter are the page cache's: one copy whoever maps them, given back when memory is short.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {name: value for name, value, *_ in (line.split() for line in lines[1:])}
    return tuple(int(fields[name]) / 1e3 for name in ("Private_Dirty:", "Private_Clean:"))


def read_at_random(metadata, workers, reads):
    """The largest memory_of_process of a loader worker when each has read `reads` pairs."""
    pairs = captions.load_captions("yfcc15m", metadata)
    order = np.random.default_rng(0).integers(len(pairs), size=workers * reads)
    loader = DataLoader(
        RandomReads(pairs),
        1000,
        sampler=order.tolist(),
        num_workers=workers,
        multiprocessing_context="fork",  # as on Linux; a process that was spawned would spawn
    )
    return np.max([np.max(batch, axis=1) for batch in loader], axis=0)


def benchmark_open(args):
    print(f"open: metadata of {args.pairs:,} pairs\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        metadata = os.path.join(folder, "yfcc15m.pkl")
        in_process(write_pickle, metadata, args.pairs)
        print(f"  pickle                    {os.path.getsize(metadata) / 1e9:8.2f} GB")
        open_captions = partial(captions.load_captions, "yfcc15m", metadata)
        (seconds, _), memory = in_process(timed, open_captions)
        print(f"  conversion                {seconds:8.1f} s, at most {memory:.2f} GB of memory")
        (seconds, number), memory = in_process(timed, open_captions)
        print(f"  opening                   {seconds:8.3f} s, {number:,} pairs")
        (own, mapped), _ = in_process(read_at_random, metadata, args.workers, args.reads)
        print(
            f"  private memory a worker   {own:8.1f} MB, after {args.reads:,} random pairs in each "
            f"of {args.workers} workers\n"
            f"  file pages mapped alone   {mapped:8.1f} MB, in the cache that all processes share"
        )


# ---------------------------------------------------------------------------------------------
# features: classifiers on frozen features


def write_features(path, images, classes, width):
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (images, width))
    for start in range(0, images, 10_000):
        part = file[start : start + 10_000]
        part[:] = rng.normal(size=part.shape)
    np.save(f"{path}-labels.npy", rng.integers(0, classes, images))


def open_features(path):
    train, labels = np.load(path, mmap_mode="c"), np.load(f"{path}-labels.npy")
    return torch.from_numpy(train), torch.from_numpy(labels)


def measure_knn(path, classes, queries):
    train, labels = open_features(path)
    started, device = time.perf_counter(), torch.device("cpu")
    features.knn_rankings(
        train, labels, train[:queries], labels[:queries], classes, (20, 200), 0.07, device
    )
    return time.perf_counter() - started


def measure_logistic(path, classes, iterations):
    train, labels = open_features(path)
    started, rows = time.perf_counter(), torch.arange(len(train))
    features.fit_logistic(
        train, labels, rows, classes, 1.0, torch.device("cpu"), max_iter=iterations
    )
    return time.perf_counter() - started


def benchmark_features(args):
    print(f"features: {args.images:,} x {args.width}, {args.classes} classes\n{machine()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = os.path.join(folder, "features.npy")
        in_process(write_features, path, args.images, args.classes, args.width)
        print(f"  on disk               {os.path.getsize(path) / 1e9:8.2f} GB")
        for name, function, number, unit in (
            ("k-NN", measure_knn, args.queries, "queries"),
            ("logistic regression", measure_logistic, args.iterations, "iterations"),
        ):
            seconds, memory = in_process(function, path, args.classes, number)
            print(
                f"  {name:20}  {seconds:8.1f} s for {number} {unit}, at most {memory:.2f} GB of "
                "memory, mapped file included"
            )


# ---------------------------------------------------------------------------------------------
# classifier: prompts to a zero-shot classifier


def classes_per_second(build, model, classes, templates):
    started = time.perf_counter()
    build(model, SimpleTokenizer(), classes, templates)
    return len(classes) / (time.perf_counter() - started)


@torch.no_grad()
def build_one_by_one(model, tokenizer, classes, templates):
    """The archived way: the prompts of one class at a time, 77 tokens each."""
    rows = []
    for name in classes:
        tokens = tokenizer([template.format(name) for template in templates])
        embeds = F.normalize(model.encode_text(tokens), dim=-1)
        rows.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(rows)


def benchmark_classifier(args):
    """One by one every class costs the same, so that a sample of them tells the rate."""
    labels, templates = (
        utils.read_json(path, path)["imagenet"] for path in (catalog.LABELS, catalog.TEMPLATES)
    )
    draw = random.Random(0).sample
    classes = draw(labels, min(args.classes, len(labels)))
    sample = draw(classes, min(args.sample, len(classes)))
    print(f"classifier: {len(classes)} classes x {len(templates)} prompts, fp32 on the CPU;")
    print(f"one at a time {len(sample)} of them; {machine()}, median of {args.rounds} rounds\n")
    model = models.create_model(args.model).eval()
    evaluation = Evaluation(devices.Precision("fp32", torch.device("cpu")))
    build = partial(eval_zeroshot.build_classifier, evaluation=evaluation)
    runs = {"one class at a time": (build_one_by_one, sample), "this code": (build, classes)}
    for function, _ in runs.values():  # warms up
        classes_per_second(function, model, sample[:4], templates)
    calls = {
        name: partial(classes_per_second, function, model, names, templates)
        for name, (function, names) in runs.items()
    }
    rates = compare(calls, args.rounds, warm_up=0)
    print_rates(rates, "one class at a time", "classes/s")
    return rates
