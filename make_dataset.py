"""Prepares data: what caption sets are published as becomes one Arrow file for main.py --metadata.

    python make_dataset.py yfcc15m --photos yfcc100m_dataset.txt.bz2 --output yfcc15m.arrow
    python make_dataset.py cc12m --img2dataset CC12M --output cc12m.arrow
    python make_dataset.py check  # which sets of the catalog are there, and usable
    python make_dataset.py digits  # the demo's set

Every conversion streams, ends with the numbers of pairs kept and dropped, and, called again after
an interruption, goes on where it was.
"""

import os
import re
import shutil
import tarfile
import zlib
from functools import lru_cache
from hashlib import md5
from pathlib import Path
from urllib.parse import unquote_plus

import numpy as np
from PIL import Image

import utils
from captions import (
    SOURCES,
    load_captions,
    open_coco,
    open_csv,
    parquet_rows,
    pick_redcaps,
    yfcc_image,
)
from catalog import (
    CATALOG,
    LABELS,
    add_outside_flag,
    download_split,
    get_downstream_dataset,
    is_present,
    load_catalog,
    split_name,
)
from infra import distributed
from infra.archives import has_file, read_file
from infra.arrow import Dropped, Source, describe, write_captions
from infra.untrusted import Files, check_inside, parse_rows, read_metadata
from transforms import decode_image
from utils import InputError

# ---------------------------------------------------------------------------------------------
# YFCC15M

TAG = re.compile(r"</?[abi](\s[^>]*)?>", re.IGNORECASE)
LINK = re.compile(r"(https?://|www\.)\S+")


def clean(field):
    """A quoted field of YFCC100M as plain text, without HTML tags (a, b, i) and URLs."""
    return LINK.sub("", TAG.sub("", unquote_plus(field)))


def match_ids(subset, index):
    """The photo ids of the subset, sorted, and the place of each in the index, -1 for none.

    Takes 16 bytes a pair of memory; the index is mapped.
    """
    files = Files([subset])
    photos = parse_rows(files, files.lines(), lambda line: int(line.split("\t", 1)[0]))
    ids = np.unique(np.fromiter(photos, np.int64))
    places = np.full(len(ids), -1)
    known = read_metadata(index, lambda file: np.load(file.name, mmap_mode="r"))
    if known.ndim != 1 or known.dtype.kind not in "iu" or not len(ids):
        raise InputError(f"--index {index} is no row of photo ids, or --subset {subset} is empty")
    for start in range(0, len(known), 2**20):
        chunk = known[start : start + 2**20]
        where = np.searchsorted(ids, chunk).clip(max=len(ids) - 1)
        found = np.flatnonzero(ids[where] == chunk)
        places[where[found]] = start + found
    print(f"{len(ids):,} photos in the subset, {(places < 0).sum():,} of them not in the index")
    return ids, places


def open_yfcc15m(args):
    """Lines of yfcc100m_dataset.txt: photo id in column 0, title 8, description 9."""
    ids, places = match_ids(args.subset, args.index)
    files = Files([args.photos])

    def pick(line):
        fields = line.rstrip("\n").split("\t")
        photo = int(fields[0])
        at = np.searchsorted(ids, photo)
        if at == len(ids) or ids[at] != photo:
            raise Dropped("not in the subset")
        if places[at] < 0:
            raise Dropped("not in the index of photo ids")
        return yfcc_image(places[at]), [clean(fields[8]), clean(fields[9])]

    return Source(files, files.lines(), pick)


# ---------------------------------------------------------------------------------------------
# RedCaps, CC3M and CC12M


def files_in(folder, suffix):
    found = sorted(Path(folder).glob(f"*{suffix}"))
    if not found:
        raise InputError(f"there is no {suffix} file in {folder}; check the folder")
    return Files(found)


def open_redcaps(args):
    """Per-subreddit files, each {"annotations": [...]}."""
    files = files_in(args.annotations, ".json")
    return Source(files, files.json_rows("annotations.item"), pick_redcaps)


def image_name(template, row, url):
    """The name a downloader gave an image: by its row, a hash of its URL or the URL's end."""
    data = url.encode()
    return template.format(
        row=row, crc32=zlib.crc32(data), md5=md5(data).hexdigest(), name=url.rsplit("/", 1)[-1]
    )


def open_tsv(args):
    """The published table of captions and URLs, in either order, with or without a header."""
    files = Files([args.tsv])
    try:
        image_name(args.image_name, 0, "http://a/b")
    except (LookupError, ValueError) as error:
        raise InputError(
            f"--image-name {args.image_name!r}: {error}; its fields are row, crc32, md5 and name"
        ) from error

    def rows():
        lines = files.lines()
        first = next(lines, "")
        if "://" in first:
            yield 0, first
        yield from enumerate(lines, start=int("://" in first))

    def pick(numbered):
        number, line = numbered
        fields = line.rstrip("\r\n").split("\t")
        links = [i for i, field in enumerate(fields) if re.match("https?://", field)]
        if len(fields) != 2 or not links:
            raise ValueError(f"{len(fields)} columns, not a caption and a URL")
        return image_name(args.image_name, number, fields[links[0]]), fields[1 - links[0]]

    return Source(files, rows(), pick)


@lru_cache(maxsize=1)
def shard_images(folder, shard):
    """{key: path below folder} of a shard that img2dataset wrote, a tar or a folder."""
    is_image = re.compile(r"(.+)\.(jpe?g|png|webp)")
    tar, plain = folder / f"{shard}.tar", folder / shard
    if tar.exists():
        with (
            open(tar, "rb", opener=utils.regular_file) as file,
            tarfile.open(fileobj=file, mode="r:") as members,
        ):
            names = {m.name: f"{shard}.tar/{m.name}@{m.offset_data}+{m.size}" for m in members}
    else:
        names = {n: f"{shard}/{n}" for n in (os.listdir(plain) if plain.exists() else ())}
    return {m[1]: names[name] for name in names if (m := is_image.fullmatch(name))}


def open_img2dataset(args):
    """The output of img2dataset, as files or webdataset: a parquet file for each shard."""
    folder = Path(args.img2dataset)
    files = files_in(folder, ".parquet")
    rows = parquet_rows(files, ["key", "caption", "status"])

    def pick(row):
        if row.get("status", "success") != "success":
            raise Dropped(f"not downloaded ({row['status']})")
        if row["caption"] is None:
            raise Dropped("without a caption")
        image = shard_images(folder, Path(files.path).stem).get(row["key"])
        if image is None:
            raise Dropped("without an image")
        return image, row["caption"]

    return Source(files, rows, pick)


def open_conceptual(args):
    if bool(args.tsv) == bool(args.img2dataset) or bool(args.tsv) != bool(args.root):
        raise InputError("give --tsv and --root, or --img2dataset alone")
    return open_tsv(args) if args.tsv else open_img2dataset(args)


# ---------------------------------------------------------------------------------------------
# Conversion


def only_present(source, root, allow_outside=False):
    """The source less the rows whose image is absent. An image that is not below root is an error,
    unless allow_outside.
    """

    def pick(row):
        image, captions = source.pick(row)
        check_inside(root, image, f"metadata {source.files.path}: image", allow_outside)
        if not has_file(root, image):
            raise Dropped("without an image")
        return image, captions

    return Source(source.files, source.rows, pick)


def convert(args):
    if not args.output.endswith(".arrow"):
        raise InputError(f"--output {args.output}: name it .arrow, by which main.py knows it")
    if args.root and not os.path.isdir(args.root):
        raise InputError(f"--root {args.root} is not a folder")
    source = args.open_source(args)
    if args.root:
        source = only_present(source, args.root, args.allow_outside_root)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, str) and k != "output"}
    inputs = Files([path for path in settings.values() if os.path.isfile(path)])
    counts = write_captions(args.output, source, key=[settings, inputs.signature()])
    print(f"{args.output}: {describe(counts)}")


# ---------------------------------------------------------------------------------------------
# Checking what is there


def decode_some(read, number, count=10):
    """Decodes some of `number` images, drawn at random; read(index) raises InputError."""
    for index in np.random.default_rng(0).permutation(number)[:count].tolist():
        read(index)


def simplify(name):
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_order(folders, labels):
    """What is known of the classes' order from the folders' names, as text.

    Raises InputError where a folder has the name of another class.
    """
    names = [
        {simplify(n) for n in ([label] if isinstance(label, str) else label)} for label in labels
    ]
    agreed = 0
    for number, folder in enumerate(folders):
        own = {simplify(folder), simplify(re.sub(r"^\d+[._ -]", "", folder))}
        if own & names[number]:
            agreed += 1
            continue
        for other, alias in enumerate(names):
            if own & alias:
                raise InputError(
                    f"folder {folder!r} is class {number} in sorted order, but class {other} in "
                    "labels.json"
                )
    return f"order agrees by {agreed} names" if agreed else "order not told by folder names"


def check_labelled(catalog, name, labels):
    """A line on a labelled set. Raises InputError if it cannot be used."""
    parts = []
    for is_train in (False, True):
        split = split_name(catalog, name, is_train)
        try:
            found = get_downstream_dataset(catalog, name, is_train, np.asarray, labels)
        except InputError:
            if not is_train:
                raise
            parts.append("no training split")  # zero-shot needs none
            continue
        parts.append(f"{split} {len(found):,} images")
        decode_some(found.__getitem__, len(found))
    order = "classes by name"
    if catalog[name]["type"] == "imagefolder":
        order = check_order(found.classes, labels)
    return f"{', '.join(parts)}, some decoded; {len(labels)} classes, {order}"


def check_pairs(args):
    pairs = load_captions(args.dataset, args.metadata, (args.csv_img_key, args.csv_caption_key))

    def read(index):
        path, _ = pairs[index]
        check_inside(args.root, path, f"{pairs.path}: image", args.allow_outside_root)
        return decode_image(read_file(args.root, path), f"{args.root}/{path}")

    decode_some(read, len(pairs))
    return f"{len(pairs):,} images with captions, some decoded"


def download_sets(args):
    catalog = load_catalog(args.catalog, args.allow_outside_root)
    labels = utils.read_json(LABELS, "labels")
    for name in args.datasets:
        for is_train in (True, False):
            dataset = download_split(catalog, name, is_train, labels)
            if dataset is not None:
                split = split_name(catalog, name, is_train)
                print(f"{name}: {len(dataset):,} images of {split} in {catalog[name]['path']}")


def check(args):
    catalog = load_catalog(args.catalog, args.allow_outside_root)
    labels = utils.read_json(LABELS, "labels")
    failed = []

    def verdict(name, look):
        try:
            print(f"{name:20} usable    {look()}")
        except InputError as error:
            print(f"{name:20} UNUSABLE  {error}")
            failed.append(name)

    for name, entry in catalog.items():
        if not is_present(entry):
            print(f"{name:20} absent    {entry['path']}")
        elif name not in labels:
            print(f"{name:20} UNUSABLE  labels.json has no classes for it")
            failed.append(name)
        else:
            verdict(name, lambda name=name: check_labelled(catalog, name, labels[name]))
    if args.metadata:
        verdict(args.dataset, lambda: check_pairs(args))
    if failed:
        raise InputError(f"cannot be used as they are: {', '.join(failed)}; see above")


# ---------------------------------------------------------------------------------------------
# The demo's set

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{}", "the {}", "digit {}", "number {}", "a handwritten {}")
SIZE = 32  # pixels


def save_digit(pixels, path):
    """pixels: (8, 8), 0 to 16."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path, quality=95)


def make_digits(args):
    """scikit-learn's 1,797 handwritten digits (UCI ML repository, 8 x 8 pixels).

    Writes a caption set in COCO's layout, train2017/ and annotations/, and the folders train/ and
    test/, a quarter of them held out.
    """
    from sklearn.datasets import load_digits

    root = args.root
    if os.path.exists(root):
        print(f"{root} is there already")
        return
    digits, part = load_digits(), f"{root}.part"
    shutil.rmtree(part, ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(digits.images))
    test, train = np.split(order, [len(order) // 4])

    for split, indices in (("train", train), ("test", test)):
        for i in indices:
            folder = f"{digits.target[i]}_{NAMES[digits.target[i]]}"
            save_digit(digits.images[i], f"{part}/{split}/{folder}/{i:04d}.png")
    annotations = []
    for i in train:
        save_digit(digits.images[i], f"{part}/train2017/{i:012d}.jpg")
        texts = [template.format(NAMES[digits.target[i]]) for template in CAPTIONS]
        annotations += [{"image_id": int(i), "caption": text} for text in texts]
    os.makedirs(f"{part}/annotations")
    utils.write_json(f"{part}/annotations/captions_train2017.json", {"annotations": annotations})

    os.replace(part, root)
    print(f"{root}: {len(train)} images with {len(annotations)} captions, {len(test)} held out")


# ---------------------------------------------------------------------------------------------


def add_table_flags(add):
    add("--csv-img-key", default="filepath", help="image column of a table")
    add("--csv-caption-key", default="title", help="caption column of a table")


def get_args_parser():
    parser = utils.ArgumentParser("make_dataset.py", "Prepares data")
    commands = parser.add_subparsers(required=True, metavar="command")

    def converter(name, what, open_source, root="drop rows whose image is not below this folder"):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--output", default=f"{name}.arrow", help="Arrow file to write")
        command.add_argument("--root", help=root)
        add_outside_flag(command.add_argument)
        command.set_defaults(run=convert, open_source=open_source)
        return command.add_argument

    add = converter("yfcc15m", "YFCC100M's list of photos to YFCC15M's pairs", open_yfcc15m)
    add("--photos", default="yfcc100m_dataset.txt", help="the list, plain, .gz or .bz2")
    add("--subset", default="yfcc100m_subset_data.tsv", help="photo ids of the subset")
    add("--index", default="flickr_unique_ids.npy", help="photo ids in the order of the archives")

    add = converter("redcaps", "per-subreddit annotation files to one file", open_redcaps)
    add("--annotations", required=True, help="folder of the .json files")

    for name in ("cc3m", "cc12m"):
        what = "published table and downloaded images, or img2dataset's output"
        add = converter(name, what, open_conceptual, "folder of the images of --tsv")
        add("--tsv", help="the published table of captions and URLs")
        add("--image-name", default="{row}_{crc32}", help="of {row}, {crc32}, {md5}, {name} of URL")
        add("--img2dataset", help="folder that img2dataset wrote, files or webdataset")

    add = converter(
        "csv",
        "a table, as text with a header or .parquet",
        lambda args: open_csv(args.table, (args.csv_img_key, args.csv_caption_key)),
    )
    add("--table", required=True, help="separated by comma, tab, semicolon or bar; or .parquet")
    add_table_flags(add)

    add = converter(
        "coco",
        "a captions file in COCO's format",
        lambda args: open_coco(args.captions, folder=args.folder),
    )
    add("--captions", required=True, help="such as captions_train2017.json")
    add("--folder", default="train2017", help="of the images, below the later --root")

    what = "says of each set of the catalog, and of a pre-training set, whether it can be used"
    command = commands.add_parser("check", help=what, description=what)
    add = command.add_argument
    add("--catalog", default=CATALOG, help="where the labelled sets lie (JSON)")
    add("--metadata", help="captions of a pre-training set to check, too")
    add("--dataset", default="csv", help=f"its kind: one of {', '.join(SOURCES)}")
    add("--root", default="", help="folder of its images")
    add_outside_flag(add)
    add_table_flags(add)
    command.set_defaults(run=check)

    what = "has torchvision fetch sets of the catalog that are of type torchvision"
    command = commands.add_parser("download", help=what, description=what)
    command.add_argument("--datasets", nargs="+", required=True, help="sets of the catalog")
    command.add_argument("--catalog", default=CATALOG, help="where they shall lie (JSON)")
    add_outside_flag(command.add_argument)
    command.set_defaults(run=download_sets)

    command = commands.add_parser("digits", help="handwritten digits for the demo")
    command.add_argument("--root", default="data/digits", help="folder to write")
    command.set_defaults(run=make_digits)
    return parser


def main(args):
    args.run(args)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
