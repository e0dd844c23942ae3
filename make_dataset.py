"""Prepares data: published caption sets become one Arrow file for main.py --metadata.

    python make_dataset.py yfcc15m --photos yfcc100m_dataset.txt.bz2 --output yfcc15m.arrow
    python make_dataset.py cc12m --img2dataset CC12M --output cc12m.arrow
    python make_dataset.py split --metadata cc12m.arrow --number 5000  # holds out pairs
    python make_dataset.py check  # which sets of the catalog are present and usable
    python make_dataset.py digits  # the demo's set

Every conversion streams, prints the numbers of pairs kept and dropped, and resumes after an
interruption when the same command is given again.
"""

import os
import shutil

import numpy as np
from PIL import Image

import captions
import shard_writer
import utils
from catalog import (
    CATALOG,
    LABELS,
    add_names_flag,
    add_outside_flag,
    download_split,
    is_present,
    load_catalog,
    split_name,
)
from checks import check_labelled, describe_pairs, is_usable
from holdout import hold_out
from infra import distributed
from infra.arrow import describe, write_captions
from infra.rows import Files
from utils import InputError

# ---------------------------------------------------------------------------------------------
# Conversion


def open_yfcc15m(args):
    ids, places = captions.match_ids(args.subset, args.index)
    print(f"{len(ids):,} photos in the subset, {(places < 0).sum():,} of them not in the index")
    return captions.open_yfcc100m(args.photos, ids, places)


def open_redcaps(args):
    return captions.open_subreddits(args.annotations)


def open_conceptual(args):
    if bool(args.tsv) == bool(args.img2dataset) or bool(args.tsv) != bool(args.root):
        raise InputError("give --tsv and --root, or --img2dataset alone")
    if args.img2dataset:
        return captions.open_img2dataset(args.img2dataset)
    return captions.open_conceptual(args.tsv, args.image_name)


def open_csv(args):
    return captions.open_csv(args.table, (args.csv_img_key, args.csv_caption_key))


def open_coco(args):
    return captions.open_coco(args.captions, folder=args.folder)


def convert(args):
    if not args.output.endswith(".arrow"):
        raise InputError(f"--output {args.output}: name it .arrow, by which main.py knows it")
    if args.root and not os.path.isdir(args.root):
        raise InputError(f"--root {args.root} is not a folder; give the folder of the images")
    source = args.open_source(args)
    if args.root:
        source = captions.only_present(source, args.root, args.allow_outside_root)
    # Parts of an interrupted conversion are of use only if settings and inputs are the same.
    settings = {k: v for k, v in vars(args).items() if isinstance(v, str) and k != "output"}
    inputs = Files([path for path in settings.values() if os.path.isfile(path)])
    counts = write_captions(args.output, source, key=[settings, inputs.signature()])
    print(f"{args.output}: {describe(counts)}")


def columns_of(args):
    return (args.csv_img_key, args.csv_caption_key, *args.json_caption_key)


def write_shards(args):
    rows = shard_writer.open_rows(
        args.dataset, args.metadata, columns_of(args), args.root, args.allow_outside_root
    )
    counts, several, bad = shard_writer.write_shards(rows, args.output, args.per_shard)
    print(f"{args.output}: {describe(counts)}" + (f"; the first: {bad}" if bad else ""))
    keys = f" --json-caption-key {shard_writer.FIELD}" if several else ""
    print(f"read them by --dataset webdataset --metadata {args.output}{keys}")


def split(args):
    paths = {"--metadata": args.metadata, "--output": args.output, "--held-out": args.held_out}
    for flag in ("--output", "--held-out"):
        if not paths[flag].endswith(".arrow"):
            raise InputError(f"{flag} {paths[flag]}: name it .arrow, by which main.py knows it")
    if len(set(map(os.path.realpath, paths.values()))) < len(paths):
        raise InputError(f"split writes two new files; {' and '.join(paths)} must differ")
    pairs = captions.load_captions(args.dataset, args.metadata, columns_of(args))
    print(hold_out(pairs, args.number, args.seed, args.output, args.held_out))


# ---------------------------------------------------------------------------------------------
# Checks of the sets on disk, and downloads


def check_pairs(args):
    pairs = captions.load_captions(args.dataset, args.metadata, columns_of(args))
    return describe_pairs(pairs, args.root, args.allow_outside_root)


def check(args):
    catalog = load_catalog(args.catalog, args.allow_outside_root, args.ignore_folder_names)
    labels = utils.read_json(LABELS, "labels")
    failed = []
    for name, entry in catalog.items():
        if not is_present(entry):
            print(f"{name:20} absent    {entry['path']}")
        elif not is_usable(name, lambda name=name: check_labelled(catalog, name, labels)):
            failed.append(name)
    if args.metadata and not is_usable(args.dataset, lambda: check_pairs(args)):
        failed.append(args.dataset)
    if failed:
        raise InputError(f"cannot be used as they are: {', '.join(failed)}; see above")


def download_sets(args):
    catalog = load_catalog(args.catalog, args.allow_outside_root)
    labels = utils.read_json(LABELS, "labels")
    for name in args.datasets:
        for is_train in (True, False):
            dataset = download_split(catalog, name, is_train, labels)
            if dataset is not None:
                split = split_name(catalog, name, is_train)
                print(f"{name}: {len(dataset):,} images of {split} in {catalog[name]['path']}")


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


def save_labelled(digits, indices, folder):
    """A folder for each class, such as 7_seven/0042.png."""
    for i in indices:
        name = f"{digits.target[i]}_{NAMES[digits.target[i]]}"
        save_digit(digits.images[i], f"{folder}/{name}/{i:04d}.png")


def save_captioned(digits, indices, folder):
    """COCO's layout, train2017/ and annotations/; returns the number of captions."""
    annotations = []
    for i in indices:
        save_digit(digits.images[i], f"{folder}/train2017/{i:012d}.jpg")
        texts = [template.format(NAMES[digits.target[i]]) for template in CAPTIONS]
        annotations += [{"image_id": int(i), "caption": text} for text in texts]
    os.makedirs(f"{folder}/annotations")
    table = {"annotations": annotations}
    utils.write_json(f"{folder}/annotations/captions_train2017.json", table)
    return len(annotations)


def make_digits(args):
    """scikit-learn's 1,797 handwritten digits (UCI ML repository, 8 x 8 pixels).

    Writes a caption set and the labelled folders train/ and test/. Few images have captions, as
    SLIP's gain over CLIP is then largest, and many are held out, as intervals are then narrow.
    """
    root = os.path.normpath(args.root)
    with utils.locked(root):
        if os.path.exists(root):
            print(f"{root} is there already")
        else:
            write_digits(root)


def write_digits(root):
    from sklearn.datasets import load_digits

    digits, part = load_digits(), f"{root}.part"
    shutil.rmtree(part, ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(digits.images))
    train, test = np.split(order, [256])
    save_labelled(digits, train, f"{part}/train")
    save_labelled(digits, test, f"{part}/test")
    texts = save_captioned(digits, train, part)
    os.replace(part, root)  # complete or absent
    print(f"{root}: {len(train)} images with {texts} captions, {len(test)} held out")


# ---------------------------------------------------------------------------------------------
# The command line: one subcommand for each published set, and others


def add_command(commands, name, text, run, **defaults):
    """Adds a subcommand and returns its add_argument; `run` is called with the parsed flags."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, **defaults)
    return command.add_argument


ROOT = "folder of the images; rows without one are dropped"


def add_converter(commands, name, text, open_source, root=ROOT):
    """Adds a subcommand that writes an Arrow file, and returns its add_argument.

    Args:
        commands: argparse's subparsers.
        name: name of the subcommand and, with .arrow, of its default output.
        text: its help.
        open_source: function of the parsed flags that returns a Source.
        root: help of --root.
    """
    add = add_command(commands, name, text, convert, open_source=open_source)
    add("--output", default=f"{name}.arrow", help="Arrow file to write")
    add("--root", help=root)
    add_outside_flag(add)
    return add


def add_table_flags(add):
    add("--csv-img-key", default="filepath", help="image column of a table")
    add("--csv-caption-key", default="title", help="caption column of a table")


def add_set_flags(add):
    """Those of a pre-training set, as main.py has them."""
    add("--dataset", default="csv", help=f"its kind: one of {', '.join(captions.SOURCES)}")
    add("--root", default="", help="folder of its images")
    add("--json-caption-key", default=[], nargs="+", help="caption fields of shards' .json")
    add_table_flags(add)
    add_outside_flag(add)


def add_yfcc15m(commands):
    text = "YFCC100M's list of photos to YFCC15M's pairs"
    add = add_converter(commands, "yfcc15m", text, open_yfcc15m)
    add("--photos", default="yfcc100m_dataset.txt", help="the list, plain, .gz or .bz2")
    add("--subset", default="yfcc100m_subset_data.tsv", help="photo ids of the subset")
    add("--index", default="flickr_unique_ids.npy", help="photo ids in the order of the archives")


def add_redcaps(commands):
    text = "per-subreddit annotation files to one file"
    add = add_converter(commands, "redcaps", text, open_redcaps)
    add("--annotations", required=True, help="folder of the .json files")


def add_conceptual(commands):
    text = "published table and downloaded images, or img2dataset's output"
    for name in ("cc3m", "cc12m"):
        add = add_converter(commands, name, text, open_conceptual, "folder of the images of --tsv")
        add("--tsv", help="the published table of captions and URLs")
        add("--image-name", default="{row}_{crc32}", help="of {row}, {crc32}, {md5}, {name} of URL")
        add("--img2dataset", help="folder that img2dataset wrote, files or webdataset")


def add_csv(commands):
    text = "a table, as text with a header or .parquet"
    add = add_converter(commands, "csv", text, open_csv)
    add("--table", required=True, help="separated by comma, tab, semicolon or bar; or .parquet")
    add_table_flags(add)


def add_coco(commands):
    add = add_converter(commands, "coco", "a captions file in COCO's format", open_coco)
    add("--captions", required=True, help="such as captions_train2017.json")
    add("--folder", default="train2017", help="folder of the images, below main.py's --root")


def add_split(commands):
    text = "holds out pairs of a pre-training set for main.py --val-metadata"
    add = add_command(commands, "split", text, split)
    add("--dataset", default="csv", help=f"kind of the set: one of {', '.join(captions.SOURCES)}")
    add("--metadata", required=True, help="captions, as main.py takes them")
    add("--json-caption-key", default=[], nargs="+", help="caption fields of shards' .json")
    add("--number", default=5000, type=utils.positive_int, help="images to hold out")
    add("--seed", default=0, type=utils.natural, help="of the draw")
    add("--output", default="train.arrow", help="Arrow file of the other pairs")
    add("--held-out", default="val.arrow", help="Arrow file of the pairs held out")
    add_table_flags(add)


def add_check(commands):
    text = "tells which sets of the catalog, and whether a pre-training set, can be used"
    add = add_command(commands, "check", text, check)
    add("--catalog", default=CATALOG, help="JSON file with the paths of the labelled sets")
    add("--metadata", help="captions of a pre-training set to check as well")
    add_names_flag(add)
    add_set_flags(add)


def add_shards(commands):
    text = "any caption set, or parquet with the bytes of images, as tar shards"
    add = add_command(commands, "shards", text, write_shards)
    add("--metadata", required=True, help="as main.py's; .parquet also as folder or pattern")
    add("--output", required=True, help="folder to write")
    add("--per-shard", default=10_000, type=utils.positive_int, help="rows of a shard")
    add_set_flags(add)


def add_download(commands):
    text = "downloads sets of the catalog that are of type torchvision"
    add = add_command(commands, "download", text, download_sets)
    add("--datasets", nargs="+", required=True, help="sets of the catalog")
    add("--catalog", default=CATALOG, help="JSON file with the paths to write to")
    add_outside_flag(add)


def add_digits(commands):
    add = add_command(commands, "digits", "handwritten digits for the demo", make_digits)
    add("--root", default="data/digits", help="folder to write")


COMMANDS = (add_yfcc15m, add_redcaps, add_conceptual, add_csv, add_coco)
COMMANDS += (add_shards, add_split, add_check, add_download, add_digits)


def get_args_parser():
    parser = utils.ArgumentParser("make_dataset.py", "Prepares data")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add_to in COMMANDS:
        add_to(commands)
    return parser


def main(args):
    args.run(args)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
