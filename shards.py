"""Tar shards of image-caption pairs: their index and their writing.

A sample is an image x.jpg (jpeg, png, webp) beside x.txt, or beside x.json with its captions in
some fields. The index has the place of every image and its captions, so that shards are a caption
set as any other: each sample once an epoch, in an order that anyone can repeat.
"""

import glob
import hashlib
import json
import os
import threading
import time
from collections import Counter
from functools import lru_cache, partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import utils
from infra.arrow import BATCH, INSTEAD, KEPT, NULLS, SCHEMA, read_batches, read_facts
from infra.braces import alternatives
from infra.rows import BAD_ROW, MAX_LINE, Dropped, Files, caption_texts
from infra.signals import shield_worker
from infra.tars import BLOCK, Damage, Tar, is_sound
from utils import InputError

DAMAGE = "damage"  # of a shard, beside its counts
IMAGES = ("jpg", "jpeg", "png", "webp")  # endings of images, in any case
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of packed files

# ---------------------------------------------------------------------------------------------
# Names of shards


def find_shards(metadata):
    """Paths of the shards that `metadata` names: patterns, folders and lists, joined by "::".

    A list is a .txt file, one path a line, relative to the folder of the list; lines that begin
    with # are comments. Raises InputError if a shard is absent, packed or named twice.
    """
    paths = []
    for part in os.fspath(metadata).split("::"):
        if os.path.isdir(part):
            names = [name for name in os.listdir(part) if name.endswith((".tar", *PACKED))]
            found = [os.path.join(part, name) for name in sorted(names)]
        elif part.endswith(".txt"):
            lines = map(str.strip, Files([part]).lines())
            named = [line for line in lines if line and not line.startswith("#")]
            found = [os.path.join(os.path.dirname(part), line) for line in named]
        else:
            found = alternatives(part)
        check_names(part, found)
        paths += map(os.path.abspath, found)
    if twice := [path for path, number in Counter(paths).items() if number > 1]:
        raise InputError(f"metadata {metadata} names {twice[0]} twice; name each shard once")
    return paths


def check_names(part, paths):
    """Raises InputError unless `paths`, those of one source, are tars that exist."""
    if packed := [path for path in paths if path.endswith((*PACKED, ".gz", ".zst"))]:
        raise packed_tar(packed[0])
    absent = [path for path in paths if not os.path.exists(path)]
    if dangling := [path for path in absent if os.path.islink(path)]:
        raise InputError(
            f"metadata {dangling[0]} is a link to {os.readlink(dangling[0])}, which is absent; "
            "mend or remove the link"
        )
    if not paths or len(absent) == len(paths):
        raise InputError(f"metadata {part} matches no file; check the path and the pattern")
    if absent:
        raise InputError(
            f"metadata {part}: {len(absent):,} of its {len(paths):,} shards are absent, the first "
            f"is {absent[0]}; correct the pattern, or name their folder"
        )
    if others := [path for path in paths if not path.endswith(".tar")]:
        raise InputError(f"metadata {others[0]}: shards are tars; rename it to .tar if it is one")


def packed_tar(path):
    return InputError(f"metadata {path}: packed tars cannot be read at random; unpack it to .tar")


def root_of(paths):
    """The folder that holds all shards; image paths in their index are relative to it."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


# ---------------------------------------------------------------------------------------------
# The index: headers and captions of shards


def plain_name(name):
    """A member's name as text that leads nowhere: it is shown, and never opened."""
    if name.isascii() and "/" not in name:  # as most are
        return name
    name = name.encode(errors="surrogateescape").decode(errors="replace")
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def split_members(tar, with_json):
    """The images of a Tar and the texts beside them; a key is a name up to its last dot.

    Returns ({key: Member of its image}, {key: {"txt": bytes, "json": bytes}}, damage, number of
    members whose key and kind the shard has already: the first counts). Damage is the reason why
    the end of the tar cannot be read, None for a whole tar.
    """
    images, texts, repeats, damage = {}, {}, 0, None
    try:
        for member in tar.members():
            name = plain_name(member.name)
            key, _, ending = name.rpartition(".")
            if os.path.basename(name).startswith("."):  # a file manager's
                continue
            ending, is_new = ending.lower(), True
            if ending in IMAGES:
                is_new = images.setdefault(key, member._replace(name=name)).offset == member.offset
            elif ending in ("txt", "json"):
                mine = texts.setdefault(key, {})
                is_new = ending not in mine
                is_read = is_new and (with_json or ending == "txt") and member.size <= MAX_LINE
                mine.setdefault(ending, tar.read(member.offset, member.size) if is_read else None)
            repeats += not is_new
    except Damage as error:
        damage = str(error)
    return images, texts, damage, repeats


@lru_cache(maxsize=1)
def shard_images(folder, shard):
    """{key: path below folder} of a shard that img2dataset wrote, a tar or a folder."""
    path, plain = folder / f"{shard}.tar", folder / shard
    if not path.exists() or path.is_dir():
        names = [name.rpartition(".") for name in (os.listdir(plain) if plain.exists() else ())]
        return {key: f"{shard}/{key}.{end}" for key, _, end in names if end.lower() in IMAGES}
    images, _, damage, _ = read_members(path, with_json=False)
    if damage:
        raise InputError(f"metadata {path}: {damage}; download the shard again")
    return {key: f"{shard}.tar/{m.name}@{m.offset}+{m.size}" for key, m in images.items()}


def json_captions(data, keys):
    """The captions in the fields `keys` of an object of JSON; a field may be a list of them."""
    row = json.loads(data)
    values = [row.get(key) for key in keys] if isinstance(row, dict) else []
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def captions_of(texts, keys):
    """(captions, number of nulls, whether .txt stood in for .json) of a sample, by caption_texts.

    Raises Dropped without any caption.

    Args:
        texts: {"txt": bytes, "json": bytes} of the sample; None for one that was not read.
        keys: fields of .json. A .txt has the caption if there are none, or if .json lacks them.
    """
    reason = Dropped("without a caption")
    if keys and texts.get("json"):
        try:
            return *caption_texts(json_captions(texts["json"], keys)), False
        except (ValueError, RecursionError):
            reason = Dropped("with a .json that does not parse")
        except Dropped as error:
            reason = error
    if texts.get("txt"):
        text = texts["txt"].decode("utf-8-sig", errors="surrogateescape")
        return *caption_texts(text), bool(keys) and "json" in texts
    if not keys and "json" in texts:
        reason = Dropped("without a .txt (of a .json, name the fields of captions)")
    raise reason


def read_members(path, with_json):
    """split_members of a file."""
    with open(path, "rb", buffering=0, opener=utils.regular_file) as file:
        return split_members(Tar(file), with_json)


def check_begin(path):
    """Raises InputError for a file that is no tar from its first bytes on; an empty one passes."""
    try:
        if foreign := utils.foreign_kind(path):
            raise InputError(f"metadata {path} {foreign}")
        with open(path, "rb", buffering=0, opener=utils.regular_file) as file:
            head = file.read(BLOCK)
    except OSError as error:
        raise InputError(f"metadata {path}: {error.strerror}; check the file") from error
    if head.startswith(MAGIC):
        raise packed_tar(path)
    if head.strip(b"\0") and not is_sound(head):
        raise InputError(f"metadata {path} is no tar; check the file")


def index_shard(path, root, keys):
    """(table of its pairs in the order of the images, Counter of read_pairs, damage)."""
    images, texts, damage, repeats = read_members(path, bool(keys))
    if not images and not texts:
        damage = damage or "it holds no sample"
    counts = Counter({"without an image": len(texts.keys() - images.keys())})
    counts["members of a name that their shard has already"] = repeats
    names, lists, prefix = [], [], os.path.relpath(path, root)
    for key, image in images.items():
        try:
            captions, nulls, is_instead = captions_of(texts.get(key, {}), keys)
        except Dropped as error:
            counts[str(error)] += 1
            continue
        names.append(f"{prefix}/{image.name}@{image.offset}+{image.size}")
        lists.append(captions)
        counts[NULLS] += nulls
        counts[INSTEAD] += is_instead
    counts[KEPT] = len(names)
    return pa.table([names, lists], SCHEMA), +counts, damage


class Tasks(Dataset):
    """The results of function(item), as a loader's workers compute them."""

    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.function(self.items[index])


def same(value):
    return value


def follow_parent(worker):
    """For a worker: shields it as any other, and ends it soon after its parent, however that ended.

    Else it would wait for ever for someone to take its result, and keep the parent's locks.
    """
    shield_worker()
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_parallel(function, items):
    """function(item) of each item in order, by as many processes as there are cores."""
    processes = min(len(os.sched_getaffinity(0)), len(items) // 4)
    return DataLoader(
        Tasks(function, items),
        batch_size=None,
        num_workers=processes,
        collate_fn=same,
        worker_init_fn=follow_parent,
        generator=torch.Generator(),  # the workers' seeds use up no random number of the run
    )


def as_batch(table):
    return pa.record_batch([column.combine_chunks() for column in table.columns], SCHEMA)


def read_before(output, first):
    """{digest: as index_shard's result} of the shards in older indices beside `output`.

    first: path of the first shard, by which indices are named.
    """
    known = {}
    for path in Path(output).parent.glob(f"{glob.escape(os.path.basename(first))}.*.arrow"):
        try:
            facts, table = read_facts(path), pa.Table.from_batches(read_batches(path), SCHEMA)
            ends = accumulate(map(itemgetter(KEPT), facts["shards"].values()))
            for (digest, found), end in zip(facts["shards"].items(), ends, strict=True):
                rows, damage = table.slice(end - found[KEPT], found[KEPT]), found.get(DAMAGE)
                counts = Counter({k: int(n) for k, n in found.items() if k != DAMAGE})
                known[digest] = rows, counts, damage
        except (*BAD_ROW, InputError, pa.ArrowException):  # of another form, or by another hand
            continue
    return known


class Shards:
    """A source, as write_captions takes it, that is read by shard and in parallel.

    A shard that an older index has is not read again. Its facts also hold "lengths", the number of
    pairs of each shard, "damaged", {path: reason} of those that cannot be read to their end, and
    "shards", {digest: counts and damage} of each.
    """

    def __init__(self, paths, keys):
        self.files, self.keys, self.root = Files(paths), list(keys), root_of(paths)

    def digests(self):
        """Of each shard and of all that the rows of its index depend on."""
        values = [json.dumps([row, self.root, self.keys]) for row in self.files.signature()]
        return [hashlib.sha256(value.encode()).hexdigest()[:16] for value in values]

    def results(self, skip, output):
        """Yields (path, digest, *result of index_shard) of the shards after the first `skip`."""
        rest = [*zip(self.files.paths, self.digests(), strict=True)][skip:]
        known = read_before(output, self.files.paths[0])
        index = partial(index_shard, root=self.root, keys=self.keys)
        fresh = iter(in_parallel(index, [path for path, digest in rest if digest not in known]))
        for path, digest in rest:
            rows, counts, damage = known[digest] if digest in known else next(fresh)
            yield path, digest, rows, counts, damage

    def chunks(self, facts, output):
        """As infra.arrow's read_chunks: whole shards, of at least BATCH pairs together."""
        lengths, counts = list(facts.get("lengths", [])), Counter(facts["counts"])
        damaged, own = dict(facts.get("damaged", {})), dict(facts.get("shards", {}))
        tables, number = [], len(self.files.paths)
        for path in self.files.paths:  # at once, and not after hours
            check_begin(path)
        results = self.results(len(lengths), output)
        with tqdm(desc=output, unit=" shards", disable=None, total=number) as bar:
            bar.update(len(lengths))
            for path, digest, rows, found, damage in results:
                lengths.append(len(rows))
                counts.update(found)
                own[digest] = {KEPT: 0, **found, **({DAMAGE: damage} if damage else {})}
                if damage:
                    damaged[path] = damage
                    first = next(iter(damaged.items()))
                    counts["shards not readable to their end, the first {}: {}".format(*first)] += 1
                tables.append(rows)
                bar.update()
                if len(lengths) == number or sum(map(len, tables)) >= BATCH:
                    told = {"lengths": lengths, "damaged": damaged, "shards": own}
                    told |= {"rows": sum(lengths), "counts": counts}
                    yield as_batch(pa.concat_tables(tables)), facts | told
                    tables = []
