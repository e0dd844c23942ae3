"""The command growth of benchmark.py: the time of conversions and checks as their input grows."""

import csv
import json
import os
import pickle
import tarfile
import tempfile
import time
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet

import captions
from benchmarks.data import machine
from catalog import get_downstream_dataset, load_catalog, unchanged
from classes import check_order
from eval_retrieval import read_captions
from infra.arrow import write_captions

TEXT = "a photograph of a market in an old town"
FACTORS = (1, 4, 16)


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def write_table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_array(path, rows):
    np.save(path, np.array(rows, dtype=object), allow_pickle=True)
    return path


# Each writes an input of n images into a folder, and returns the work to measure: () -> Source, or
# () -> anything.


def yfcc15m(folder, n):
    path = folder / "m.pkl"
    path.write_bytes(pickle.dumps([(i, TEXT, TEXT) for i in range(n)]))
    return partial(captions.open_yfcc15m, path, None)


def yfcc100m(folder, n):
    photos, subset, index = folder / "photos", folder / "subset", folder / "index.npy"
    photos.write_text("".join(f"{i}\t{'x	' * 7}{TEXT}\t{TEXT}\tx\n" for i in range(n)))
    subset.write_text("".join(f"{i}\n" for i in range(0, n, 2)))
    np.save(index, np.random.default_rng(0).permutation(n))
    return lambda: captions.open_yfcc100m(photos, *captions.match_ids(subset, index))


def coco_table(n):
    rows = [{"image_id": i, "caption": TEXT} for _ in range(5) for i in range(n)]
    return {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(n)], "annotations": rows}


def coco(folder, n):
    return partial(captions.open_coco, write_json(folder / "c.json", coco_table(n)))


def cc3m(folder, n):
    rows = [{"image_id": f"{i}.jpg", "captions": [TEXT]} for i in range(n)]
    return partial(captions.open_cc3m, write_array(folder / "m.npy", rows), None)


def redcaps(folder, n):
    rows = [{"image_id": str(i), "subreddit": "x", "caption": TEXT} for i in range(n)]
    write_json(folder / "r.json", {"annotations": rows})
    return partial(captions.open_subreddits, folder)


def redcaps_with_nan(folder, n):
    rows = [{"image_id": str(i), "subreddit": "x", "caption": TEXT} for i in range(n - 1)]
    rows.append({"image_id": "x", "subreddit": "x", "caption": TEXT, "score": float("nan")})
    write_json(folder / "r.json", {"annotations": rows})
    return partial(captions.open_subreddits, folder)


def table(folder, n):
    rows = [("filepath", "title"), *((f"{i}.jpg", TEXT) for i in range(n))]
    return partial(captions.open_csv, write_table(folder / "t.csv", rows), rows[0])


def parquet(folder, n):
    columns = {"filepath": [f"{i}.jpg" for i in range(n)], "title": [TEXT] * n}
    pa.parquet.write_table(pa.table(columns), folder / "t.parquet")
    return partial(captions.open_csv, folder / "t.parquet", tuple(columns))


def published(folder, n):
    rows = [(TEXT, f"http://a.b/{i}.jpg") for i in range(n)]
    path = write_table(folder / "t.tsv", rows, "\t")
    return partial(captions.open_conceptual, path, "{row}_{crc32}")


def img2dataset(folder, n):
    keys = [f"{i:09d}" for i in range(n)]
    columns = {"key": keys, "caption": [TEXT] * n, "status": ["success"] * n}
    pa.parquet.write_table(pa.table(columns), folder / "00000.parquet")
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for key in keys:
            archive.addfile(tarfile.TarInfo(f"{key}.jpg"), BytesIO())
    return partial(captions.open_img2dataset, folder)


def images_in_one_zip(folder, n):
    with zipfile.ZipFile(folder / "i.zip", "w") as archive:
        for i in range(n):
            archive.writestr(f"{i}.jpg", b"x")
    rows = [("filepath", "title"), *((f"i.zip/{i}.jpg", TEXT) for i in range(n))]
    path = write_table(folder / "t.csv", rows)
    return lambda: captions.only_present(captions.open_csv(path, rows[0]), folder)


def imagefolder(folder, n):
    for i in range(n):
        place = folder / f"set/test/{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").touch()
    return opened(folder, "imagefolder", list("abcdefghij"))


def filelist(folder, n):
    (folder / "set").mkdir()
    np.save(folder / "set/test_images.npy", np.array([f"{i}.jpg" for i in range(n)]))
    np.save(folder / "set/test_labels.npy", np.arange(n) % 10)
    return opened(folder, "filelist", list("abcdefghij"))


def opened(folder, kind, labels):
    path = write_json(folder / "catalog.json", {"mine": {"path": "set", "type": kind}})
    sets = load_catalog(path)
    return lambda: get_downstream_dataset(sets, "mine", False, unchanged, labels)


def order_of_classes(folder, n):
    names = [f"n{i:08d}" for i in range(n)]
    folders = SimpleNamespace(class_to_idx={name: i for i, name in enumerate(names)})
    return lambda: check_order("any", folders, [f"class {i}" for i in range(n)])


def retrieval(folder, n):
    return partial(read_captions, write_json(folder / "c.json", coco_table(n)), "test", 5)


CONVERSIONS = (yfcc15m, yfcc100m, coco, cc3m, redcaps, redcaps_with_nan, table, parquet)
CONVERSIONS += (published, img2dataset, images_in_one_zip)
CHECKS = (imagefolder, filelist, order_of_classes, retrieval)


def seconds(make, n, folder):
    """Of this process's CPU time, which other programs do not lengthen."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        work, output = make(Path(inner), n), os.path.join(inner, "out.arrow")
        started = time.process_time()
        if make in CONVERSIONS:
            write_captions(output, work())
        else:
            work()
        return time.process_time() - started


def benchmark_growth(args):
    """CPU seconds of every conversion and check at 1, 4 and 16 times the input."""
    sizes = [args.images * factor for factor in FACTORS]
    print(f"growth: CPU seconds for {', '.join(f'{n:,}' for n in sizes)} images or classes")
    print(f"{machine()}\n")
    for make in (*CONVERSIONS, *CHECKS):
        seconds(make, args.images, args.folder)  # warms up
        times = [seconds(make, n, args.folder) for n in sizes]
        name, shown = make.__name__.replace("_", " "), "  ".join(f"{t:8.3f}" for t in times)
        print(f"  {name:20}  {shown}    {times[-1] / times[0]:6.1f} x", flush=True)
