"""Verdicts on sets on disk: whether they can be used, their numbers, what is wrong with them."""

import os
import time
from collections import Counter
from itertools import accumulate, islice

import numpy as np

from catalog import classes_of, get_downstream_dataset, split_name
from classes import check_order
from decoding import decode_image
from infra.archives import file_of, read_file
from infra.arrow import describe
from infra.untrusted import check_inside
from utils import InputError

SAMPLE = 256  # pairs of a caption set that are decoded
MAX_BAD = 0.01  # share of them that may be unreadable, as training has it
MOST_NAMED = 20  # damaged shards

# ---------------------------------------------------------------------------------------------
# Labelled sets


def decode_some(read, number, count=10):
    """Calls read(index), which raises InputError for a bad image, for a few of `number` images."""
    for index in np.random.default_rng(0).permutation(number)[:count].tolist():
        read(index)


def describe_order(agreed, silent):
    """A text on the order of class folders, from classes.check_order's result."""
    if not agreed:
        return "order not told by folder names"
    of = f" of {len(agreed) + len(silent)}" if silent else ""
    return f"order agrees by {len(agreed)}{of} names"


def split_is_present(entry, split):
    """Whether there is a folder or a list of a split."""
    ends = ("", "_images.npy")
    return any(os.path.exists(os.path.join(entry["path"], f"{split}{end}")) for end in ends)


def check_labelled(catalog, name, labels):
    """(line on a set of the catalog, no faults); labels: {name: classes}. See is_usable."""
    if catalog[name]["labels"] not in labels:
        raise InputError("labels.json has no classes for it")
    parts, entry = [], catalog[name]
    for is_train in (False, True):
        split = split_name(catalog, name, is_train)
        try:
            classes = classes_of(catalog, name, is_train, labels)
            found = get_downstream_dataset(catalog, name, is_train, np.asarray, classes)
        except InputError:
            if not is_train or split_is_present(entry, split):
                raise
            parts.append("no training split")  # zero-shot needs none
            continue
        parts.append(f"{split} {len(found):,} images")
        decode_some(found.__getitem__, len(found))
    order = "classes by name"
    if entry["ignore_names"]:
        order = "folder names ignored"
    elif hasattr(found, "class_to_idx"):
        order = describe_order(*check_order(name, found, classes))
    return f"{', '.join(parts)}, some decoded; {len(classes)} classes, {order}", ()


def is_usable(name, look):
    """Prints and returns a verdict; look() returns (text, faults), or raises InputError.

    faults: texts; with one the set can be used, but not all that was meant to be in it.
    """
    try:
        text, faults = look()
    except InputError as error:
        print(f"{name:20} UNUSABLE  {error}")
        return False
    print(f"{name:20} {'DAMAGED ' if faults else 'usable  '}  {text}")
    for fault in faults:
        print(f"{'':32}{fault}")
    return True


# ---------------------------------------------------------------------------------------------
# Caption sets


def describe_shards(pairs, root):
    """Number and size of the shards of an index; "" for another set."""
    if len(pairs.lengths) == 1 and "lengths" not in pairs.facts:
        return ""
    ends = accumulate(pairs.lengths)
    first = [end - length for end, length in zip(ends, pairs.lengths, strict=True) if length]
    paths = [file_of(os.path.join(root, pairs[row][0])) for row in first]
    sizes = [os.path.getsize(path) / 1e6 for path in paths if os.path.exists(path)] or [0]
    return (
        f" in {len(pairs.lengths):,} shards of {min(pairs.lengths):,} to {max(pairs.lengths):,} "
        f"pairs and {min(sizes):,.1f} to {max(sizes):,.1f} MB"
    )


def damaged_shards(pairs):
    """Lines on the shards of an index that cannot be read to their end; [] if all can."""
    damaged = plain_items(pairs.facts, "damaged", str)
    lines = [f"{path}: {reason}" for path, reason in islice(damaged.items(), MOST_NAMED)]
    if more := len(damaged) - len(lines):
        lines.append(f"and {more:,} others")
    if damaged:
        lines.append(
            f"The pairs behind the damage of {len(damaged):,} of {len(pairs.lengths):,} shards are "
            "lost: fetch these shards again, or train without them."
        )
    return lines


def plain_items(facts, name, kind):
    """The dict `name` of an index's facts, which may be by a stranger's hand: values of a kind."""
    found = facts.get(name)
    items = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in items if type(value) is kind}


def describe_pairs(pairs, root, allow_outside=False):
    """(line on a caption set, its faults), from its counts and a sample of its images.

    Args:
        pairs: Captions.
        root: folder of the images, "" for that of the pairs.
        allow_outside: bool, whether image paths may lead out of it.

    See is_usable. Raises InputError if more than MAX_BAD of the sample cannot be read.
    """
    root, bad, started = root or pairs.root, [], time.perf_counter()
    sample = np.random.default_rng(0).permutation(len(pairs))[:SAMPLE].tolist()
    for index in sample:
        path, _ = pairs[index]
        check_inside(root, path, f"{pairs.path}: image", allow_outside)
        try:
            decode_image(read_file(root, path), f"{root}/{path}")
        except InputError as error:
            bad.append(str(error))
    speed = len(sample) / (time.perf_counter() - started)
    if len(bad) > MAX_BAD * len(sample):
        raise InputError(f"{len(bad)} of {len(sample)} images cannot be read; {bad[0]}")
    unreadable = f", {len(bad)} of them unreadable ({bad[0]})" if bad else ""
    counts = plain_items(pairs.facts, "counts", int)
    counts = f"; {describe(Counter(counts))}" if counts else ""
    return (
        f"{len(pairs):,} images with captions{describe_shards(pairs, root)}; {len(sample)} "
        f"decoded, {speed:,.0f} images/s{unreadable}{counts}"
    ), damaged_shards(pairs)
