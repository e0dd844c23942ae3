"""The Arrow file of captions: written from the rows of any source, mapped by all processes."""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import utils
from infra.rows import Dropped, Files, Malformed, caption_texts, parse_rows, path_text
from utils import InputError

TEXT = pa.large_string()
SCHEMA = pa.schema([("image", TEXT), ("captions", pa.large_list(TEXT))])
BATCH = 2**16  # rows read between two batches of the Arrow file
KEPT, NULLS = "kept", "nulls"  # the counts of kept rows, and of nulls in their lists of captions
INSTEAD = "instead"  # of kept rows whose captions were not in the named fields
OTHER_UNITS = ("members ", "shards ")  # reasons that begin so do not count rows


@dataclass
class Source:
    """A caption set as its files describe it, row by row."""

    files: Files
    rows: Iterable  # one may be a Dropped
    pick: Callable  # row -> (image path, caption or captions); may raise Dropped

    def chunks(self, facts, output):
        return read_chunks(self, facts, output)


# ---------------------------------------------------------------------------------------------
# From rows to the file


def read_pairs(source, skip=0):
    """Of each row after the first `skip`: (image, captions, nulls), or the reason to drop it."""

    def pick(row):
        try:
            if isinstance(row, Dropped):
                raise row
            image, captions = source.pick(row)
            return path_text(image), *caption_texts(captions)
        except Dropped as dropped:
            return str(dropped)

    return parse_rows(source.files, source.rows, pick, skip, Malformed())


def read_chunks(source, facts, output):
    """Yields (record batch, facts up to its end) of the rows that `facts` does not cover.

    Args:
        source: the Source to read.
        facts: dict of "key", "rows" (number of rows read) and "counts" (Counter of read_pairs).
        output: path of the file to write, the name of the progress bar.
    """
    rows, counts = facts["rows"], Counter(facts["counts"])
    pairs = read_pairs(source, rows)
    with tqdm(desc=output, unit=" rows", unit_scale=True, disable=None) as bar:
        bar.update(rows)
        while chunk := list(islice(pairs, BATCH)):
            rows += len(chunk)
            counts.update(pair if isinstance(pair, str) else KEPT for pair in chunk)
            kept = [pair for pair in chunk if not isinstance(pair, str)]
            images, texts, nulls = (list(map(itemgetter(i), kept)) for i in range(3))
            counts[NULLS] += sum(nulls)
            columns = [images, texts]
            yield pa.record_batch(columns, SCHEMA), facts | {"rows": rows, "counts": counts}
            bar.update(len(chunk))
            bar.set_postfix_str(f"{source.files.share():.0%} of the input")


def write_arrow(path, batches, facts):
    """Writes record batches as an Arrow file, atomically; `facts` goes as JSON into its schema."""
    schema = SCHEMA.with_metadata({"facts": json.dumps(facts)})

    def write(file):
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    utils.write_atomically(path, write)


def part_path(folder, number):
    return folder / f"{number:06d}.arrow"


def read_facts(path):
    """The facts that write_arrow gave a file; {} of a file by another hand."""
    metadata = pa.ipc.open_file(pa.memory_map(os.fspath(path))).schema.metadata or {}
    try:
        facts = json.loads(metadata.get(b"facts", "{}"))
    except (ValueError, RecursionError):
        facts = {}
    return facts if isinstance(facts, dict) else {}


def read_parts(folder, key):
    """(finished parts in `folder`, facts of the last one); no parts of another key."""
    fresh = {"key": key, "rows": 0, "counts": Counter()}
    parts, facts = [], fresh
    while (path := part_path(folder, len(parts))).exists():
        facts = read_facts(path)
        if facts.get("key") != key:
            return [], fresh
        parts.append(path)
    return parts, facts


def write_captions(output, source, key="", reuse=False):
    """Converts a source into the Arrow file `output`.

    Finished parts wait in the folder `<output>.part`: after an interruption another call resumes
    behind them if the input files and `key` are the same. Calls at once wait for each other.

    Args:
        output: path of the Arrow file.
        source: a Source, or anything else that has `files` and `chunks`.
        key: the settings of the conversion, as JSON values.
        reuse: bool, whether an `output` that another process has written meanwhile will do.

    Returns a Counter: KEPT and each reason for a dropped row -> number of rows, and NULLS. Raises
    InputError if a file cannot be read or no row is left; then nothing remains on disk.
    """
    with utils.locked(output) as is_alone:
        if reuse and os.path.exists(output):
            return Counter()
        if is_alone:
            return merge_parts(output, source, key, Path(f"{output}.part"))
        with utils.temporary_name(output) as folder:
            return merge_parts(output, source, key, Path(f"{folder}.part"))


def merge_parts(output, source, key, folder):
    """write_captions by the parts in a folder that no other process uses."""
    inputs = json.dumps([key, source.files.signature()])
    parts, facts = read_parts(folder, hashlib.sha256(inputs.encode()).hexdigest())
    if not parts:
        shutil.rmtree(folder, ignore_errors=True)
    utils.make_folder(folder)
    try:
        chunks = source.chunks(facts, str(output))
        for batch, facts in chunks:
            parts.append(part_path(folder, len(parts)))
            write_arrow(parts[-1], [batch], facts)
        counts = Counter(facts["counts"])
        if not counts[KEPT]:
            raise InputError(f"metadata {source.files.path} holds no image; {describe(counts)}")
        merged = folder / "merged.arrow"
        write_arrow(merged, (batch for part in parts for batch in read_batches(part)), facts)
        os.replace(merged, output)
    except InputError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return counts


def describe(counts):
    """The result of write_captions in words."""
    found = [pair for pair in counts.most_common() if pair[0] not in (KEPT, NULLS, INSTEAD)]
    found.sort(key=lambda pair: pair[0].startswith(OTHER_UNITS))
    reasons = "".join(f"; {number:,} {reason}" for reason, number in found)
    total = sum(number for reason, number in found if not reason.startswith(OTHER_UNITS))
    nulls = f"; {counts[NULLS]:,} nulls among the captions of others" if counts[NULLS] else ""
    if counts[INSTEAD]:
        nulls += f"; {counts[INSTEAD]:,} take their .txt, as .json lacks the fields named"
    return f"{counts[KEPT]:,} pairs kept, {total:,} rows dropped{reasons}{nulls}"


# ---------------------------------------------------------------------------------------------
# The file, mapped into memory


class Texts:
    """Rows of a large_string array. Raises ValueError if an offset leaves the mapped file."""

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
    """The record batches of an Arrow file, mapped. Raises InputError if they are damaged."""
    try:
        if foreign := utils.foreign_kind(path):
            raise InputError(f"metadata {path} {foreign}")
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        if not reader.schema.equals(SCHEMA):
            raise InputError(f"metadata {path}: its columns are not {', '.join(SCHEMA.names)}")
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate()
            image, captions = batch.columns
            if image.null_count + captions.null_count + captions.values.null_count:
                raise InputError(f"metadata {path} has nulls among its texts; write it without")
            if len(batch):
                yield batch
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"metadata {path} is no complete Arrow file: {error}") from error


class Captions:
    """Rows (image path, captions) of an Arrow file; processes share its pages, none copies them.

    Attributes:
        root: folder that the image paths are relative to, "" if the source does not tell.
        facts: dict of the conversion, see write_captions; {} of a file by another hand.
        lengths: number of rows of each shard; rows of another source are as those of one.
    """

    def __init__(self, path, root=""):
        self.path, self.root, self.batches, self.starts = os.fspath(path), root, [], [0]
        for batch in read_batches(path):
            image, captions = batch.columns
            lists = np.frombuffer(captions.buffers()[1], np.int64)
            self.batches.append((Texts(image), lists, Texts(captions.values)))
            self.starts.append(self.starts[-1] + len(batch))
        self.facts = read_facts(path)
        lengths = self.facts.get("lengths")
        is_sound = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
        self.lengths = lengths if is_sound and sum(lengths) == len(self) else [len(self)]

    def __reduce__(self):  # a spawned worker maps the file itself
        return Captions, (self.path, self.root)

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
