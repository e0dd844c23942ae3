"""The command workers of benchmark.py: memory of a loader's worker, ours and others'."""

import multiprocessing
import re
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import captions
import datasets
import lanes
import models
import stream_shards
from benchmarks.archived import ArchivedDataset, ArchivedLoader
from benchmarks.data import BATCH, CPU, FORM, SIZE, in_process, machine, write_pictures
from benchmarks.shards import Peer, write_shards
from tokenizer import SimpleTokenizer

OWN, SHARE, RESIDENT = PARTS = ("own", "share", "resident")


def parts_of(text):
    """{part: MB} of the text of a process's smaps_rollup.

    own: pages of this process alone. share: these, and of each page that several processes have
    its part (PSS). resident: all pages that it has (RSS), as most monitors show it.
    """
    sizes = {name: int(size) / 1e3 for name, size in re.findall(r"(\w+): +(\d+) kB", text)}
    own = sizes["Private_Dirty"] + sizes["Private_Clean"]
    return {OWN: own, SHARE: sizes["Pss"], RESIDENT: sizes["Rss"]}


def memory_of(process):
    return parts_of(Path(f"/proc/{process}/smaps_rollup").read_text())


def open_archived(folder, workers):
    pairs = captions.load_captions("csv", f"{folder}/pairs.csv")
    dataset = ArchivedDataset(pairs, Path(folder), models.CLIP.views, SimpleTokenizer(), SIZE)
    return ArchivedLoader(dataset, BATCH, workers, CPU)


def open_files(folder, workers):
    pairs = captions.load_captions("csv", f"{folder}/pairs.csv")
    dataset = datasets.CaptionDataset(pairs, folder, models.CLIP.views, FORM)
    collate = datasets.Collate(SimpleTokenizer())
    return datasets.open_loader(dataset, BATCH, workers, CPU, collate_fn=collate)


def find_tars(folder):
    return sorted(map(str, Path(folder).glob("*.tar")))


def open_shards(folder, workers):
    pairs = captions.load_captions("webdataset", folder)
    dataset = datasets.CaptionDataset(pairs, pairs.root, models.CLIP.views, FORM)
    collate = datasets.Collate(SimpleTokenizer())
    order = datasets.window_order(pairs.lengths, 16)
    return datasets.open_loader(dataset, BATCH, workers, CPU, 1, collate, order)


def open_stream(folder, workers):
    commands = "::".join(f"pipe:cat {path}" for path in find_tars(folder))
    stream = stream_shards.open_stream("webdataset", commands, [], 10**6, True, "")
    dataset = lanes.StreamDataset(stream, models.CLIP.views, FORM)
    return lanes.open_loader(dataset, BATCH, workers, CPU, 1, datasets.Collate(SimpleTokenizer()))


def open_webdataset(folder, workers):
    dataset = datasets.CaptionDataset([], folder, models.CLIP.views, FORM)
    return Peer(find_tars(folder), dataset, workers, datasets.Collate(SimpleTokenizer()))


LOADERS = {
    "archived code, files": open_archived,
    "files": open_files,
    "shards": open_shards,
    "streamed shards": open_stream,
    "webdataset": open_webdataset,
}


# The parent's imports are in each worker's resident memory, but are not copied.
IMPORTS = {"main.py": "main", "a webdataset loader": "torch, torchvision, PIL.Image, webdataset"}


def measure(name, folder, workers, number):
    """[memory of each worker of a loader] after some batches."""
    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn
    batches = LOADERS[name](folder, workers).start(0)
    for _ in islice(batches, number):
        pass
    return [memory_of(worker.pid) for worker in multiprocessing.active_children()]


def memory_of_imports(modules):
    code = f"import {modules}; print(open('/proc/self/smaps_rollup').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return parts_of(done.stdout)


def benchmark_workers(args):
    """Memory of a loader's worker: what is its own, and what it shares with other processes."""
    print(f"workers: CLIP, batches of {BATCH}, after {args.batches} of {args.workers} workers")
    print(f"{machine()}\n\n  MB of a worker        own   its share   resident")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_pictures(Path(folder), args.samples, zips=0)
        write_shards(Path(folder), 6 * args.workers, args.samples)
        for name in LOADERS:
            found, _ = in_process(measure, name, folder, args.workers, args.batches)
            most = [max(row[part] for row in found) for part in PARTS]
            print("  {:20}  {:5.0f}  {:10.0f}  {:9.0f}".format(name, *most))
    print("\n  MB resident after the imports of")
    for name, modules in IMPORTS.items():
        print(f"  {name:20}  {memory_of_imports(modules)[RESIDENT]:24.0f}")
