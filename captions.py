"""Caption sets for pre-training: every source becomes one Arrow file, mapped by all processes.

A source is read as rows; `pick` makes (image path, captions) of a row. The archived formats are
converted once, into a cache beside them; make_dataset.py converts what sets are published as.
"""

import csv
import hashlib
import json
import os
import sqlite3
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import pyarrow.parquet

import utils
from infra.arrow import Captions, Source, write_captions
from infra.untrusted import Files, parse_rows, plain_text, read_metadata, read_npy, read_pickle
from utils import InputError

# ---------------------------------------------------------------------------------------------
# The sets in their archived formats: (metadata path, columns) -> Source


def open_yfcc15m(path, columns):
    """Pickled list of (index, title, description); either text may be empty, and both count."""

    def pick(row):
        index, title, description = row
        return yfcc_image(int(index)), [title, description]

    return Source(Files([path]), read_metadata(path, read_pickle), pick)


def yfcc_image(index):
    name = f"{index:08d}"
    return f"images/{name[:2]}/{name[2:5]}.zip/{name[5:]}.jpg"


def open_coco(path, columns=None, folder="train2017"):
    """COCO's captions file: the captions of an image together, images in order of appearance.

    Images are named as the file's list of images says, or by their 12-digit number.
    """
    files = Files([path])

    def annotation(row):
        return int(row["image_id"]), plain_text(row["caption"])

    def name(row):
        return int(row["id"]), plain_text(row["file_name"])

    def rows():
        database = sqlite3.connect("")  # a temporary file: memory does not grow with the set
        database.execute("create table images (image integer primary key, name text)")
        database.execute("create table captions (image integer, caption text)")
        names = parse_rows(files, files.json_rows("images.item"), name)
        database.executemany("insert or replace into images values (?, ?)", names)
        captions = parse_rows(files, files.json_rows("annotations.item"), annotation)
        database.executemany("insert into captions values (?, ?)", captions)
        grouped = """
            select coalesce(name, printf('%012d.jpg', image)), caption
            from captions
            join (select image, min(rowid) as first from captions group by image) using (image)
            left join images using (image)
            order by first, captions.rowid"""
        for image, group in groupby(database.execute(grouped), itemgetter(0)):
            yield f"{folder}/{image}", [caption for _, caption in group]

    return Source(files, rows(), itemgetter(0, 1))


def open_cc3m(path, columns):
    """.npy of dicts: image_id (a path), captions."""
    rows = read_metadata(path, read_npy)
    return Source(Files([path]), rows, lambda row: (str(row["image_id"]), row["captions"]))


def open_cc12m(path, columns):
    """.npy of dicts: image_name (a path), image_id, captions."""
    rows = read_metadata(path, read_npy)
    return Source(Files([path]), rows, lambda row: (str(row["image_name"]), row["captions"]))


def open_redcaps(path, columns):
    """JSON list of annotations: image_id, subreddit, caption."""
    files = Files([path])
    return Source(files, files.json_rows("item"), pick_redcaps)


def pick_redcaps(row):
    return f"{row['subreddit']}/{row['image_id']}.jpg", row["caption"]


def open_csv(path, columns):
    """A table: .parquet, or text with a header and the separator that splits it into `columns`."""
    files, pick = Files([path]), itemgetter(*columns)
    if str(path).endswith(".parquet"):
        return Source(files, parquet_rows(files, columns), pick)
    lines = files.lines()
    header = next(parse_rows(files, lines, str), "")
    for separator in "\t,;|":
        names = next(parse_rows(files, csv.reader([header], delimiter=separator), list), [])
        if set(columns) <= set(names):
            table = csv.DictReader(chain([header], lines), delimiter=separator, strict=True)
            return Source(files, table, pick)
    raise InputError(
        f"metadata {path}: no columns {' and '.join(map(repr, columns))} in its header "
        f"{header.strip()[:200]!r}; name them by --csv-img-key and --csv-caption-key"
    )


def parquet_rows(files, columns=None):
    """Rows of parquet files as dicts."""
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=columns):
            yield from batch.to_pylist()


SOURCES = {
    "yfcc15m": open_yfcc15m,
    "coco": open_coco,
    "cc3m": open_cc3m,
    "cc12m": open_cc12m,
    "redcaps": open_redcaps,
    "csv": open_csv,
}


# ---------------------------------------------------------------------------------------------
# From rows to the Arrow file


# ---------------------------------------------------------------------------------------------
# The Arrow file, mapped into memory


def cache_path(dataset, metadata, columns):
    """Where the conversion lies: beside the metadata, or in ~/.cache/slip where that is read-only.

    Its name holds a digest of all that it depends on, so that no stale one is ever opened.
    """
    key = json.dumps([1, dataset, columns, Files([metadata]).signature()])
    name = f"{os.path.basename(metadata)}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.arrow"
    beside = Path(metadata).absolute().parent
    return (beside if os.access(beside, os.W_OK) else Path.home() / ".cache/slip") / name


def load_captions(dataset, metadata, columns=("filepath", "title")):
    """The Captions of a pre-training set, from an .arrow file or an archived format.

    columns: image and caption column, for csv. Raises InputError for an unknown set, and for
    metadata that is absent, does not parse, lacks a field or is empty.
    """
    if dataset not in SOURCES:
        raise InputError(f"unknown dataset {dataset!r}; choose from {', '.join(SOURCES)}")
    path = Path(metadata)
    if path.suffix != ".arrow":
        path = cache_path(dataset, metadata, columns)
        if not path.exists():
            utils.make_folder(path.parent)
            source = SOURCES[dataset](metadata, columns)
            write_captions(path, source, folder=f"{path}.{os.getpid()}.part")
    captions = Captions(path)
    if not len(captions):
        raise InputError(f"metadata {metadata} holds no image; check --metadata")
    return captions
