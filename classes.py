"""The classes of a labelled set: those of labels.json against the files' numbers and names."""

import functools
import re

import numpy as np

from infra.distributed import is_main_process
from torchvision_sets import ALIASES, plain
from utils import InputError


def check_names(name, labels):
    """Raises InputError unless each class of the set `name` is a text or a list of synonyms."""
    if not isinstance(labels, list):
        raise InputError(f"labels of {name!r} are {repr(labels)[:80]}, not a list; correct them")
    for label in labels:
        synonyms = label if isinstance(label, list) else [label]
        if not synonyms or not all(is_text(synonym) for synonym in synonyms):
            raise InputError(
                f"labels of {name!r}: {repr(label)[:80]} is neither a text nor a list of texts; "
                "correct it"
            )


def is_text(value):
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half of a pair


def check_labels(found, labels, source):
    if found != len(labels):
        raise InputError(
            f"{source} has {found} classes, but labels.json has {len(labels)} for this set; "
            "check the folder or the labels"
        )


def plain_names(classes):
    """{name in letters and digits alone: numbers of the classes that have it}."""
    numbers = {}
    for i, synonyms in enumerate(classes):
        for synonym in [synonyms] if isinstance(synonyms, str) else synonyms:
            numbers.setdefault(joined(synonym), set()).add(i)
    numbers.pop("", None)
    return numbers


def joined(name):
    """The letters and digits of a name, in lower case."""
    return plain(name).replace(" ", "")


def check_order(name, dataset, labels):
    """Compares the names of class folders with the classes that their numbers mean.

    A name agrees as it is, as torchvision's alias, or behind a number ("7_seven") or WordNet's id.
    Names that are no class's, such as these numbers and ids alone, tell nothing.

    Args:
        name: name of the set.
        dataset: one split, as its layout opens it; one without class_to_idx tells nothing.
        labels: list of the set's classes, each a text or a list of synonyms.

    Returns (the folders whose name agrees, the others).

    Raises InputError for a folder with the name of a class of another number.
    """
    known, aliases, agreed, silent = plain_names(labels), ALIASES.get(name, {}), [], []
    for folder, number in getattr(dataset, "class_to_idx", {}).items():
        forms = (folder, aliases.get(folder, ""), re.sub(r"^n?\d+[._ -]+", "", folder))
        meant = next((known[joined(form)] for form in forms if joined(form) in known), set())
        if meant and number not in meant:
            told, taken = (repr(labels[i])[:40] for i in (min(meant), number))
            raise InputError(
                f"{name}: folder {folder!r} is class {number}, {taken}, by its place, but class "
                f"{min(meant)}, {told}, by its name; rename the folders, correct the labels, or "
                "have the folder names ignored"
            )
        (agreed if meant else silent).append(folder)
    return agreed, silent


def wordnet_ids():
    """{WordNet's id: class number} of ImageNet's 1,000 classes, as timm lists them."""
    from timm.data import ImageNetInfo  # slow to import: only when needed

    return {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def shared_classes(name, source, folders, labels):
    """The classes that a set has of another set's, told by the names of its class folders.

    A folder is named by the class, by its WordNet id if the other set is ImageNet, or by its
    number from 0. Numbers tell the class only if all are there: without the first or the last,
    folders counted from 1 would look the same.

    Args:
        name: of the set.
        source: name of the other set.
        folders: in the order of the set's classes.
        labels: list of the other set's classes.

    Returns the list of the folders' classes. Raises InputError for a folder of no class, and for
    another order than that of `labels`.
    """
    ids = wordnet_ids() if source == "imagenet" else {}
    names = {n: min(found) for n, found in plain_names(labels).items() if len(found) == 1}
    if all(folder.isdecimal() for folder in folders):
        if list(map(int, folders)) != list(range(len(labels))):
            raise InputError(
                f"{name}: its {len(folders)} folders are numbers, but not {source}'s classes 0 to "
                f"{len(labels) - 1}, each once; rename them"
            )
        return labels
    numbers = [ids.get(folder[:9], names.get(joined(folder))) for folder in folders]
    if None in numbers:
        raise InputError(
            f"{name}: folder {folders[numbers.index(None)]!r} is no class of {source}; name the "
            "folders as its classes, or omit labels in the catalog"
        )
    for i in range(1, len(numbers)):
        if numbers[i - 1] >= numbers[i]:
            raise InputError(
                f"{name}: folders {folders[i - 1]!r} and {folders[i]!r} are not in the order of "
                f"{source}'s classes {numbers[i - 1]} and {numbers[i]}; rename them"
            )
    return [labels[number] for number in numbers]


@functools.cache  # said once, however often the set is opened
def note_order(name, agreed, silent):
    """Says on rank 0 that only some class folders have the name of their class."""
    if agreed and silent and is_main_process():
        shown = ", ".join(map(repr, silent[:3])) + (", ..." if len(silent) > 3 else "")
        print(
            f"note: {name}: {len(agreed)} of {len(agreed) + len(silent)} class folders have the "
            f"name of their class in labels.json; taken by their place: {shown}",
            flush=True,
        )


def class_numbers(found, labels, source):
    """Class numbers 0 to C-1 from numbers, or from names such as clevr_counts' "count_10".

    Args:
        found: array of numbers or names, one for each image.
        labels: list of the C classes of labels.json.
        source: names the file in errors.
    """
    names = {label: i for i, label in enumerate(labels) if isinstance(label, str)}
    try:
        numbers = [
            names[label.removeprefix("count_")] if isinstance(label, str) else int(label)
            for label in np.asarray(found).tolist()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: {error} is not in labels.json for this set") from error
    if not numbers or not 0 <= min(numbers) <= max(numbers) < len(labels):
        raise InputError(
            f"{source} holds classes {min(numbers, default='none')} to "
            f"{max(numbers, default='none')}, but labels.json has {len(labels)} for this set"
        )
    return numbers
