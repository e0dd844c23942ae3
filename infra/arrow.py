"""The Arrow file of captions: from rows of any source, then mapped into memory by all processes."""

import json
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

import utils
from infra.untrusted import BAD_INPUT, Files, first_line
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
# From rows to the file


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
# The file, mapped into memory


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
