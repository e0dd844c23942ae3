"""Caption sets for pre-training: every source becomes one Arrow file, mapped by all processes.

A source is read as rows; `pick` makes (image path, captions) of a row. The archived formats are
converted once, into a cache beside them; make_dataset.py converts what sets are published as.
"""

import csv
import hashlib
import json
import os
import shutil
import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, count, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

import utils
from files import BAD_INPUT, Files, first_line, read_metadata, read_npy, read_pickle
from utils import InputError

TEXT = pa.large_string()
SCHEMA = pa.schema([("image", TEXT), ("captions", pa.large_list(TEXT))])
BATCH = 2**16  # rows read between two batches of the Arrow file
KEPT = "kept"


class Dropped(Exception):
    """Raised by `pick` for a row to leave out; the reason is counted."""


@dataclass
class Source:
    """What a caption set is read from."""

    files: Files
    rows: Iterable
    pick: Callable  # row -> (image path, caption or captions)


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
        names = each(files, files.json_rows("images.item"), name)
        database.executemany("insert or replace into images values (?, ?)", names)
        captions = each(files, files.json_rows("annotations.item"), annotation)
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
    header = next(each(files, lines, str), "")
    for separator in "\t,;|":
        names = next(each(files, csv.reader([header], delimiter=separator), list), [])
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


def plain_text(value):
    value.encode()  # fails on what is no text, and on half a surrogate pair
    return value


def each(files, rows, pick, skip=0):
    """pick(row) for each row after the first `skip`; an InputError names the file and the row."""
    path, first = None, 0
    try:
        rows = iter(rows)
    except TypeError:
        raise InputError(f"metadata {files.path} holds no list of rows; check --dataset") from None
    for number in count():
        try:
            row = next(rows)
            if files.path != path:
                path, first = files.path, number
            if number < skip:
                continue
            value = pick(row)
        except StopIteration:
            return
        except BAD_INPUT as error:
            where = number - first if files.path == path else 0
            reason = first_line(error)
            reason = f"no {reason}" if isinstance(error, KeyError) else reason
            raise InputError(
                f"metadata {files.path}, row {where}: {reason}; the file is damaged, or a field is "
                "missing or of another kind"
            ) from error
        yield value


def read_pairs(source, skip=0):
    """(image, captions) of each row after the first `skip`; for one to leave out, the reason."""

    def pick(row):
        try:
            image, captions = source.pick(row)
        except Dropped as dropped:
            return str(dropped)
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("no caption")
        return plain_text(image), [plain_text(caption) for caption in captions]

    return each(source.files, source.rows, pick, skip)


def write_arrow(path, batches, facts):
    """Writes record batches as an Arrow file, beside and renamed; `facts`: JSON for its schema."""
    schema = SCHEMA.with_metadata({"facts": json.dumps(facts)})

    def write(file):
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    utils.write_atomically(path, write)


def read_parts(folder, key):
    """The finished parts below `folder`, the rows behind them and their counts, if of this key."""
    parts, consumed, counts = [], 0, Counter()
    while (path := folder / f"{len(parts):06d}.arrow").exists():
        facts = json.loads(pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata[b"facts"])
        if facts["key"] != key:
            return [], 0, Counter()
        parts, consumed, counts = [*parts, path], facts["rows"], Counter(facts["counts"])
    return parts, consumed, counts


def write_captions(output, source, key="", folder=None):
    """Converts a source into the Arrow file `output`; returns a Counter of rows kept and dropped.

    Finished parts wait in `<output>.part` (or `folder`): a call after an interruption goes on
    behind them, if the input files and `key`, the settings, are the same. Raises InputError for a
    row that does not fit, and where none is left; then nothing remains.
    """
    folder = Path(folder or f"{output}.part")
    key = json.dumps([key, source.files.signature()])
    parts, consumed, counts = read_parts(folder, key)
    if not parts:
        shutil.rmtree(folder, ignore_errors=True)
    utils.make_folder(folder)
    pairs = read_pairs(source, consumed)
    try:
        with tqdm(desc=str(output), unit=" rows", unit_scale=True, disable=None) as bar:
            bar.update(consumed)
            while chunk := list(islice(pairs, BATCH)):
                consumed += len(chunk)
                counts.update(pair if isinstance(pair, str) else KEPT for pair in chunk)
                kept = [pair for pair in chunk if not isinstance(pair, str)]
                columns = [list(map(itemgetter(i), kept)) for i in (0, 1)]
                parts.append(folder / f"{len(parts):06d}.arrow")
                facts = {"key": key, "rows": consumed, "counts": counts}
                write_arrow(parts[-1], [pa.record_batch(columns, SCHEMA)], facts)
                bar.update(len(chunk))
                bar.set_postfix_str(f"{source.files.share():.0%} of the input")
        if not counts[KEPT]:
            raise InputError(f"metadata {source.files.path} holds no image; {describe(counts)}")
        facts = {"key": key, "rows": consumed, "counts": counts}
        merged = folder / "merged.arrow"  # its name is this process's own, unlike the output's
        write_arrow(merged, (batch for part in parts for batch in read_batches(part)), facts)
        os.replace(merged, output)
    except InputError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return counts


def describe(counts):
    """A Counter of write_captions in words."""
    dropped = [(reason, number) for reason, number in counts.most_common() if reason != KEPT]
    reasons = "".join(f"; {number:,} {reason}" for reason, number in dropped)
    total = sum(number for _, number in dropped)
    return f"{counts[KEPT]:,} pairs kept, {total:,} rows dropped{reasons}"


# ---------------------------------------------------------------------------------------------
# The Arrow file, mapped into memory


class Texts:
    """Rows of a large_string array; offsets of a damaged file are noticed, not followed."""

    def __init__(self, array):
        _, offsets, data = array.buffers()
        self.offsets = np.frombuffer(offsets, np.int64)[: len(array) + 1]
        self.data = memoryview(data) if data else b""

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, row):
        start, end = self.offsets[row : row + 2].tolist()
        if not 0 <= start <= end <= len(self.data):
            raise ValueError("text outside of the file")
        return str(self.data[start:end], "utf-8")


def read_batches(path):
    """The record batches of an Arrow file, mapped. Raises InputError where they do not fit."""
    try:
        open(path, "rb", opener=utils.regular_file).close()
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        if not reader.schema.equals(SCHEMA):
            raise InputError(f"metadata {path}: its columns are not {', '.join(SCHEMA.names)}")
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate()
            if len(batch):
                yield batch
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"metadata {path} is no complete Arrow file: {error}") from error


class Captions:
    """Rows (image path, captions) of an Arrow file. Processes share its pages, none copies them."""

    def __init__(self, path):
        self.path, self.batches, self.starts = os.fspath(path), [], [0]
        for batch in read_batches(path):
            image, captions = batch.columns
            lists = np.frombuffer(captions.buffers()[1], np.int64)
            self.batches.append((Texts(image), lists, Texts(captions.values)))
            self.starts.append(self.starts[-1] + len(batch))

    def __reduce__(self):  # a spawned worker maps the file itself
        return Captions, (self.path,)

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.starts, index) - 1
        images, lists, texts = self.batches[number]
        row = index - self.starts[number]
        try:
            first, last = lists[row : row + 2].tolist()
            if not 0 <= first < last <= len(texts):
                raise ValueError("captions outside of the file")
            return images[row], [texts[i] for i in range(first, last)]
        except ValueError as error:
            raise InputError(f"metadata {self.path}, row {index}: damaged ({error})") from error


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
