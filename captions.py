"""Caption sets for pre-training: every source becomes one Arrow file, mapped by all processes.

A source is read as rows; `pick` turns a row into (image path, captions). SOURCES lists the
archived formats, which are converted once, into a cache beside them. The published tables take
one call of make_dataset.py.
"""

import csv
import hashlib
import json
import os
import re
import sqlite3
import zlib
from collections import Counter
from hashlib import md5
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import unquote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet

import utils
from infra.archives import has_file
from infra.arrow import KEPT, Captions, Source, describe, write_captions
from infra.rows import (
    Dropped,
    Files,
    is_missing,
    kept_rows,
    only_text,
    parse_rows,
    path_text,
    plain_text,
    table_rows,
)
from infra.untrusted import check_inside, first_line, read_metadata, read_npy, read_pickle
from shards import Shards, find_shards, root_of, shard_images
from utils import InputError

# ---------------------------------------------------------------------------------------------
# The archived formats: (metadata path, image and caption column) -> Source


def open_yfcc15m(path, columns):
    """Pickled list of (index, title, description); title and description are two captions."""

    def pick(row):
        index, title, description = row
        return yfcc_image(int(index)), [title, description]

    return Source(Files([path]), read_metadata(path, read_pickle), pick)


def yfcc_image(index):
    name = f"{index:08d}"
    return f"images/{name[:2]}/{name[2:5]}.zip/{name[5:]}.jpg"


def open_coco(path, columns=None, folder="train2017"):
    """COCO's captions file: the captions of an image together, images in order of appearance.

    An image's file name is that of the list of images, or else its 12-digit number.
    """
    files = Files([path])
    return Source(files, coco_rows(files, folder), itemgetter(0, 1))


def coco_rows(files, folder):
    """Yields (image path, captions), grouped by SQLite on disk so that memory stays constant."""
    dropped = Counter()

    def name(row):
        return coco_id(row["id"]), plain_text(row["file_name"])

    def annotation(row):
        return coco_id(row["image_id"]), only_text(row.get("caption"))

    database = sqlite3.connect("")  # a temporary file
    database.execute("create table images (image text primary key, name text)")
    database.execute("create table captions (image text, caption text)")
    # An image without a usable name is named by its number, as one that is not listed.
    names = kept_rows(files, files.json_rows("images.item"), name, Counter())
    database.executemany("insert or replace into images values (?, ?)", names)
    rows = kept_rows(files, files.json_rows("annotations.item"), annotation, dropped)
    database.executemany("insert into captions values (?, ?)", rows)
    database.execute("create index by_image on captions (image)")
    grouped = """
        select image, name, caption
        from captions
        join (select image, min(rowid) as first from captions group by image) using (image)
        left join images using (image)
        order by first, captions.rowid"""
    for (image, known), group in groupby(database.execute(grouped), itemgetter(0, 1)):
        try:
            yield f"{folder}/{coco_file(image, known)}", [row[2] for row in group]
        except Dropped as error:
            yield error
    for reason, number in dropped.items():
        yield from (Dropped(reason) for _ in range(number))


def coco_id(value):
    """The text of an image's number or name, by which captions find their image."""
    return path_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def coco_file(image, name):
    """The file name of an image, by its coco_id unless it is listed with a name."""
    if not name and not image.isdecimal():
        raise Dropped("of an image that has no file name and no number")
    return name or f"{int(image):012d}.jpg"


def open_cc3m(path, columns):
    """.npy of dicts: image_id (a path), captions."""
    rows = read_metadata(path, read_npy)
    return Source(Files([path]), rows, lambda row: (row["image_id"], row.get("captions")))


def open_cc12m(path, columns):
    """.npy of dicts: image_name (a path), image_id, captions."""
    rows = read_metadata(path, read_npy)
    return Source(Files([path]), rows, lambda row: (row["image_name"], row.get("captions")))


def open_redcaps(path, columns):
    """JSON list of annotations: image_id, subreddit, caption."""
    files = Files([path])
    return Source(files, files.json_rows("item"), pick_redcaps)


def pick_redcaps(row):
    image = f"{path_text(row['subreddit'])}/{path_text(row['image_id'])}.jpg"
    return image, row.get("caption")


def open_csv(path, columns):
    """A table: .parquet, or text with a header and the separator that splits it into `columns`."""
    files, columns = Files([path]), columns[:2]
    if str(path).endswith(".parquet"):
        return Source(files, parquet_rows(files, columns), itemgetter(*columns))
    lines = files.lines()
    header = next(parse_rows(files, lines, str), "")
    for separator in "\t,;|":
        names = next(parse_rows(files, csv.reader([header], delimiter=separator), list), [])
        names = [name.strip() for name in names]
        places = [i for column in columns for i, name in enumerate(names) if name == column.strip()]
        if len(places) == len(columns):
            rows = table_rows(lines, separator, len(names))
            return Source(files, rows, itemgetter(*places))
        if len(places) > len(columns):
            raise InputError(f"metadata {path}: its header names a column twice; rename one")
    raise InputError(
        f"metadata {path}: no columns {' and '.join(map(repr, columns))} in its header "
        f"{header.strip()[:200]!r}; name its columns of image paths and captions"
    )


def open_parquet(path, columns=(), file=None):
    """A ParquetFile. Raises InputError if it is damaged, or lacks one of `columns`.

    file: to read from, if it is open.
    """
    try:
        table = pyarrow.parquet.ParquetFile(file or path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"metadata {path}: {first_line(error)}; check the file") from error
    if absent := [column for column in columns if column not in table.schema_arrow.names]:
        raise InputError(f"metadata {path}: no column {absent[0]!r}; name one it has")
    return table


def parquet_rows(files, columns):
    """Rows of parquet files as dicts."""
    for file in files:
        for batch in open_parquet(files.path, columns, file).iter_batches(columns=columns):
            yield from batch.to_pylist()


SOURCES = {
    "yfcc15m": open_yfcc15m,
    "coco": open_coco,
    "cc3m": open_cc3m,
    "cc12m": open_cc12m,
    "redcaps": open_redcaps,
    "csv": open_csv,
    "webdataset": lambda path, columns: Shards(find_shards(path), columns[2:]),
}
FINDERS = {"webdataset": find_shards}  # of the sets in several files: metadata -> their paths


# ---------------------------------------------------------------------------------------------
# YFCC15M as published: YFCC100M's list of photos, the ids of the subset, and an index of archives

TAG = re.compile(r"</?[abi](\s[^>]*)?>", re.IGNORECASE)
LINK = re.compile(r"(https?://|www\.)\S+")


def open_yfcc100m(path, ids, places):
    """YFCC100M's list of photos, filtered to the YFCC15M subset.

    Args:
        path: yfcc100m_dataset.txt, with the photo id in column 0, title in 8, description in 9.
        ids: (P,) sorted photo ids of the subset.
        places: (P,) place of each photo in the archives, -1 if it is in none.
    """
    files = Files([path])

    def pick(line):
        fields = line.rstrip("\n").split("\t")
        photo = int(fields[0])
        at = np.searchsorted(ids, photo)
        if at == len(ids) or ids[at] != photo:
            raise Dropped("not in the subset")
        if places[at] < 0:
            raise Dropped("not in the index of photo ids")
        return yfcc_image(places[at]), [clean(fields[8]), clean(fields[9])]

    return Source(files, files.full_lines(), pick)


def match_ids(subset, index):
    """(ids, places), as open_yfcc100m takes them: 16 bytes of memory a photo, the index is mapped.

    subset: path of a text file with the photo ids in its first column; index: path of a .npy of
    photo ids in the order of the archives.
    """
    files = Files([subset])
    photos = parse_rows(files, files.full_lines(), lambda line: int(line.split("\t", 1)[0]))
    ids = np.unique(np.fromiter(photos, np.int64))
    places = np.full(len(ids), -1)
    known = read_metadata(index, lambda file: np.load(file.name, mmap_mode="r"))
    if known.ndim != 1 or known.dtype.kind not in "iu" or not len(ids):
        raise InputError(f"index {index} is no row of photo ids, or subset {subset} is empty")
    for start in range(0, len(known), 2**20):
        chunk = known[start : start + 2**20]
        nearest = np.searchsorted(ids, chunk).clip(max=len(ids) - 1)
        found = np.flatnonzero(ids[nearest] == chunk)
        places[nearest[found]] = start + found
    return ids, places


def clean(field):
    """A quoted field of YFCC100M as plain text, without HTML tags (a, b, i) and URLs."""
    return LINK.sub("", TAG.sub("", unquote_plus(field)))


# ---------------------------------------------------------------------------------------------
# RedCaps, CC3M and CC12M as published


def files_in(folder, suffix):
    found = sorted(Path(folder).glob(f"*{suffix}"))
    if not found:
        raise InputError(f"there is no {suffix} file in {folder}; check the folder")
    return Files(found)


def open_subreddits(folder):
    """RedCaps' folder of per-subreddit files, each {"annotations": [...]}."""
    files = files_in(folder, ".json")
    return Source(files, files.json_rows("annotations.item"), pick_redcaps)


def open_conceptual(path, image_name):
    """CC3M's or CC12M's table of captions and URLs, in either order, with or without a header.

    image_name: template of the downloaded images' paths, as name_image fills it.
    """
    files = Files([path])
    try:
        name_image(image_name, 0, "http://a/b")
    except (LookupError, ValueError) as error:
        raise InputError(
            f"image name {image_name!r}: {error}; its fields are row, crc32, md5 and name"
        ) from error

    def pick(numbered):
        number, line = numbered
        fields = line.rstrip("\r\n").split("\t")
        links = [i for i, field in enumerate(fields) if re.match("https?://", field)]
        if len(fields) != 2 or not links:
            raise ValueError(f"{len(fields)} columns, not a caption and a URL")
        return name_image(image_name, number, fields[links[0]]), fields[1 - links[0]]

    return Source(files, number_rows(files.full_lines()), pick)


def number_rows(lines):
    """(row from 0, line) of the lines that are not blank; a first one without a URL is a header."""
    first = next(lines, "")
    if "://" in first:
        yield 0, first
    yield from enumerate(lines, start=int("://" in first))


def name_image(template, row, url):
    """The name a downloader gave an image: by its row, a hash of its URL or the URL's end."""
    data = url.encode()
    return template.format(
        row=row, crc32=zlib.crc32(data), md5=md5(data).hexdigest(), name=url.rsplit("/", 1)[-1]
    )


def open_img2dataset(folder):
    """The output of img2dataset, as files or webdataset: a parquet file for each shard."""
    folder = Path(folder)
    files = files_in(folder, ".parquet")

    def pick(row):
        if row.get("status", "success") != "success":
            raise Dropped(f"not downloaded ({row['status']})")
        if is_missing(row["caption"]):
            raise Dropped("without a caption")
        image = shard_images(folder, Path(files.path).stem).get(row["key"])
        if image is None:
            raise Dropped("without an image")
        return image, row["caption"]

    return Source(files, parquet_rows(files, ["key", "caption", "status"]), pick)


# ---------------------------------------------------------------------------------------------
# From a source to its Captions


def only_present(source, root, allow_outside=False):
    """The source without the rows whose image is absent below root.

    Raises InputError, as rows are read, for an image path that leads out of root, unless
    allow_outside.
    """

    def pick(row):
        image, captions = source.pick(row)
        image = path_text(image)
        check_inside(root, image, f"metadata {source.files.path}: image", allow_outside)
        if not has_file(root, image):
            raise Dropped("without an image")
        return image, captions

    return Source(source.files, source.rows, pick)


def cache_path(dataset, paths, columns):
    """The path of the converted file: beside the first input, or in ~/.cache/slip if read-only.

    Its name holds a digest of all that it depends on, so that no stale one is ever opened.
    """
    key = json.dumps([2, dataset, columns, Files(paths).signature()])
    name = f"{os.path.basename(paths[0])}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.arrow"
    beside = Path(paths[0]).absolute().parent
    if os.access(beside, os.W_OK):
        return beside / name
    try:
        return utils.make_folder(os.path.expanduser("~/.cache/slip")) / name
    except InputError as error:
        raise InputError(f"metadata {paths[0]} is in a read-only folder: {error} HOME") from error


def load_captions(dataset, metadata, columns=("filepath", "title")):
    """The Captions of a pre-training set.

    Args:
        dataset: a name of SOURCES.
        metadata: path of an .arrow file, or of the set's archived format.
        columns: image and caption column, for "csv"; behind them fields of captions in the .json
            of "webdataset".

    Raises InputError for an unknown set, and for metadata that are absent, damaged or empty.
    """
    if dataset not in SOURCES:
        raise InputError(f"unknown dataset {dataset!r}; choose from {', '.join(SOURCES)}")
    path, root = Path(metadata), ""
    if path.suffix != ".arrow":
        paths = FINDERS[dataset](metadata) if dataset in FINDERS else [metadata]
        root = root_of(paths) if dataset in FINDERS else ""
        path = cache_path(dataset, paths, columns)
        if not path.exists():
            counts = write_captions(path, SOURCES[dataset](metadata, columns), reuse=True)
            if counts.total() > counts[KEPT]:
                print(f"{path}: {describe(counts)}", flush=True)
    captions = Captions(path, root)
    if not len(captions):
        raise InputError(f"metadata {metadata} holds no image; check the file")
    return captions
