"""Any caption set as tar shards: 15 million small files are more than most file systems like.

The bytes of an image stay as they are. A sample of one caption has it as .txt. One of several has
all in the field "captions" of .json, and the first that is not blank as .txt. Each shard is
complete or absent, so the same call resumes an interrupted one.
"""

import io
import json
import os
import tarfile
from bisect import bisect_right
from collections import Counter
from functools import partial
from itertools import accumulate

import pyarrow as pa
from tqdm import tqdm

import utils
from captions import load_captions, open_parquet
from infra.archives import read_file
from infra.arrow import KEPT, describe
from infra.braces import alternatives
from infra.rows import Dropped, Files, caption_texts
from infra.untrusted import check_inside, first_line
from shards import in_parallel, read_members
from utils import InputError

FIELD = "captions"  # of .json

# ---------------------------------------------------------------------------------------------
# The rows to write: read(start, stop) yields (bytes of an image, captions). In the place of a row
# without these it yields a Dropped, and of one whose image cannot be read the InputError.


class ImageFiles:
    """Pairs of a caption set, whose images are files or members of archives.

    Args:
        pairs: Captions.
        root: folder that the image paths are relative to.
        allow_outside: bool, whether they may lead out of it.
    """

    def __init__(self, pairs, root, allow_outside=False):
        self.pairs, self.root, self.allow_outside = pairs, root, allow_outside

    def __len__(self):
        return len(self.pairs)

    def signature(self):
        return [os.path.abspath(self.root), Files([self.pairs.path]).signature()]

    def read(self, start, stop):
        for index in range(start, stop):
            path, captions = self.pairs[index]
            check_inside(self.root, path, f"{self.pairs.path}: image", self.allow_outside)
            try:
                yield read_file(self.root, path), captions
            except InputError as error:
                yield error


class ImageParquet:
    """Rows of parquet files with the bytes of images, as Hugging Face's sets have them.

    Args:
        paths: of the files.
        columns: names of the image column, a struct with `bytes` or binary, and of the captions.
    """

    def __init__(self, paths, columns):
        self.paths, self.columns = paths, list(columns)
        pairs = [(path, open_parquet(path, self.columns).metadata) for path in paths]
        self.groups = [(p, g) for p, t in pairs for g in range(t.num_row_groups)]
        lengths = [t.row_group(g).num_rows for _, t in pairs for g in range(t.num_row_groups)]
        self.starts = [0, *accumulate(lengths)]

    def __len__(self):
        return self.starts[-1]

    def signature(self):
        return [self.columns, Files(self.paths).signature()]

    def read(self, start, stop):
        for number in range(bisect_right(self.starts, start) - 1, len(self.groups)):
            place, (path, group) = self.starts[number], self.groups[number]
            if place >= stop:
                return
            try:
                table = open_parquet(path)
                for batch in table.iter_batches(64, row_groups=[group], columns=self.columns):
                    first, last = max(start - place, 0), min(stop - place, len(batch))
                    if first < last:
                        yield from map(self.pick, batch.slice(first, last - first).to_pylist())
                    place += len(batch)
            except (OSError, pa.ArrowException) as error:
                reason = f"{first_line(error)}; the file is damaged"
                raise InputError(f"metadata {path}: {reason}") from error

    def pick(self, row):
        image, captions = (row[column] for column in self.columns)
        data = image.get("bytes") if isinstance(image, dict) else image
        try:
            if not data:
                raise Dropped("without the bytes of an image")
            return data, caption_texts(captions)[0]
        except Dropped as error:
            return error


def find_parquet(metadata):
    """Paths of the .parquet files that a path, a pattern or a folder names, [] for none."""
    if os.path.isdir(metadata):
        names = [name for name in os.listdir(metadata) if name.endswith(".parquet")]
        return [os.path.join(metadata, name) for name in sorted(names)]
    paths = alternatives(os.fspath(metadata))
    return paths if all(path.endswith(".parquet") for path in paths) else []


def has_bytes(path, column):
    """Whether a column of a parquet file holds the bytes of images, and not their paths."""
    schema = open_parquet(path).schema_arrow
    kind = schema.field(column).type if column in schema.names else pa.null()
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def open_rows(dataset, metadata, columns, root="", allow_outside=False):
    """The rows of any caption set, as write_shards takes them; see load_captions, ImageFiles."""
    paths = find_parquet(metadata) if dataset == "csv" else []
    if paths and has_bytes(paths[0], columns[0]):
        return ImageParquet(paths, columns[:2])
    pairs = load_captions(dataset, metadata, columns)
    if not os.path.isdir(root := root or pairs.root):
        raise InputError(f"root {root!r} is not a folder; give the folder of the images")
    return ImageFiles(pairs, root, allow_outside)


# ---------------------------------------------------------------------------------------------
# Shards


def ending_of(data):
    """An image's ending by its first bytes. Raises Dropped for a format that shards have not."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    raise Dropped("with an image that is no JPEG, PNG or WebP")


def members_of(data, captions):
    """[(ending, bytes)] of a sample."""
    members = [(ending_of(data), data)]
    if len(captions) > 1:
        members.append(("json", json.dumps({FIELD: captions}, ensure_ascii=False).encode()))
    first = next((text for text in captions if text.strip()), "")
    return [*members, ("txt", first.encode())]


def shard_path(folder, number):
    return os.path.join(folder, f"{number:05d}.tar")


def write_shard(number, rows, folder, per_shard):
    """Writes a shard: rows number * per_shard on, named by their numbers.

    Returns (Counter, as that of write_captions; whether a sample has several captions; the first
    reason why an image cannot be read, "" if all can).
    """
    counts, several, bad = Counter(), False, ""
    start = number * per_shard
    samples = enumerate(rows.read(start, min(start + per_shard, len(rows))), start)

    def write(file):
        nonlocal several, bad
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for row, sample in samples:
                if isinstance(sample, InputError):
                    bad = bad or str(sample)
                    sample = Dropped("without a readable image")
                try:
                    if isinstance(sample, Dropped):
                        raise sample
                    members = members_of(*sample)
                except Dropped as error:
                    counts[str(error)] += 1
                    continue
                counts[KEPT] += 1
                several = several or len(members) > 2
                for ending, data in members:
                    member = tarfile.TarInfo(f"{row:09d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))

    utils.write_atomically(shard_path(folder, number), write)
    return counts, several, bad


def count_shard(number, rows, folder, per_shard):
    """As write_shard, of one that an earlier call wrote."""
    images, texts, _, _ = read_members(shard_path(folder, number), with_json=False)
    size = min(per_shard, len(rows) - number * per_shard)
    lost = Counter({"by an earlier call": size - len(images)})
    return Counter({KEPT: len(images)}) + lost, any("json" in t for t in texts.values()), ""


def write_shards(rows, folder, per_shard):
    """Writes 00000.tar, 00001.tar, ... of `per_shard` rows each; those that are there stay.

    Args:
        rows: ImageFiles or ImageParquet.
        folder: to write, with the facts of the conversion as conversion.json.
        per_shard: rows of a shard, fewer samples if some are dropped.

    Returns as write_shard does, of all shards. Raises InputError if the folder holds other shards,
    and if no image can be read.
    """
    check_begin(rows)
    facts = [rows.signature(), len(rows), per_shard]
    record = os.path.join(utils.make_folder(folder), "conversion.json")
    with utils.locked(record) as is_locked:
        if not os.path.exists(record) and not find_tars(folder):
            utils.write_json(record, facts)
        if not os.path.exists(record) or utils.read_json(record, "facts") != facts:
            raise InputError(f"folder {folder} holds other shards; choose another")
        numbers = range(-(-len(rows) // per_shard))
        done = [number for number in numbers if os.path.exists(shard_path(folder, number))]
        todo = sorted(set(numbers) - set(done))
        for number in todo if is_locked else ():  # of a call that was killed, and large
            utils.remove_temporaries(shard_path(folder, number), days=0)
        shape = {"rows": rows, "folder": folder, "per_shard": per_shard}
        counts, several, bad = Counter(), False, ""
        for function, own in ((count_shard, done), (write_shard, todo)):
            results = in_parallel(partial(function, **shape), own)
            for found, has_json, reason in tqdm(results, folder, unit=" shards", disable=None):
                counts += found
                several, bad = several or has_json, bad or reason
    if not counts[KEPT]:
        raise InputError(f"no image can be written; {describe(counts)}; check the images")
    return counts, several, bad


def check_begin(rows, number=20):
    """Raises InputError if none of the first images can be read: a wrong root writes nothing."""
    first = list(rows.read(0, min(number, len(rows))))
    if first and all(isinstance(sample, InputError) for sample in first):
        raise InputError(
            f"the first {len(first)} images cannot be read; check the root; {first[0]}"
        )


def find_tars(folder):
    return [name for name in os.listdir(folder) if name.endswith(".tar")]
