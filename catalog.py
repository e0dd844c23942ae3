"""The catalog of labelled sets, for zero-shot evaluation, classifiers and fine-tuning.

open_splits opens both splits of a set, get_downstream_dataset one; CATALOG_TYPES lists the layouts.
"""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from classes import (
    check_labels,
    check_names,
    check_order,
    class_numbers,
    note_order,
    shared_classes,
)
from decoding import decode_image
from folders import ImageFolder, by_number, class_folders
from infra.archives import file_of, read_file
from infra.untrusted import check_inside, read_metadata, read_npy
from torchvision_sets import SETS, open_torchvision
from utils import InputError, read_json, read_json_object

HERE = Path(__file__).parent
CATALOG, LABELS, TEMPLATES = (
    str(HERE / name) for name in ("dataset_catalog.json", "labels.json", "templates.json")
)


# ---------------------------------------------------------------------------------------------
# The catalog file


def load_catalog(path=CATALOG, allow_outside=False, ignore_names=False):
    """The catalog, {name: {"type", "path", "train", "test", "pixels", "labels"}}.

    Paths are relative to its file. "pixels" is "upright", or "archived" as in decoding.py.
    "labels" is the set whose classes and prompts a set has; without it they are its own.

    A set may lie anywhere by an absolute path or one with ~. A relative path may leave its folder
    by "../" only if allow_outside; each entry carries that flag for the paths that its set lists.
    If ignore_names, names of class folders may contradict the labels: each entry carries that too.
    """
    folder = os.path.dirname(os.path.abspath(path))
    catalog = read_json(path, "catalog")
    if not isinstance(catalog, dict):
        raise InputError(f"catalog {path} is no object of named sets; see dataset_catalog.json")
    for name, entry in catalog.items():
        if not isinstance(entry, dict) or not {"type", "path"} <= entry.keys():
            raise InputError(f"catalog {path}: entry {name!r} needs a type and a path")
        for key, value in entry.items():
            if not isinstance(value, str):
                raise InputError(f"catalog {path}: {name!r}: {key} is no text: {repr(value)[:80]}")
        if (pixels := entry.setdefault("pixels", "upright")) not in ("upright", "archived"):
            raise InputError(f"catalog {path}: {name!r}: pixels are upright or archived: {pixels}")
        entry.setdefault("labels", name)
        what, own = f"catalog {path}: {name!r}", os.path.expanduser(entry["path"])
        if not os.path.isabs(own):
            check_inside(folder, own, what, allow_outside)
        entry["path"] = os.path.join(folder, own)
        for split in (entry.get("train", ""), entry.get("test", "")):
            check_inside(entry["path"], split, what, allow_outside)
        entry |= {"allow_outside": allow_outside, "ignore_names": ignore_names}
    return catalog


def is_present(entry):
    return os.path.isdir(entry["path"])


def split_name(catalog, name, is_train):
    """The name of the training or test split: a folder, a file prefix or torchvision's own.

    None if torchvision's set has no training split of its own.
    """
    entry, part = catalog[name], "train" if is_train else "test"
    is_torchvision = CATALOG_TYPES.get(entry["type"]) is open_torchvision and name in SETS
    own = getattr(SETS[name], part) if is_torchvision else part
    return own and entry.get(part, own)


def add_set_flags(parser):
    """Adds the flags of training on a labelled set; returns add_argument of their group."""
    add = parser.add_argument_group("Data").add_argument
    add("--dataset", default="imagenet", help="set of the catalog, with a train and a test split")
    add("--catalog", default=CATALOG, help="JSON file with the paths of the sets")
    add("--labels", default=LABELS, help="JSON file with the class names")
    add_outside_flag(add)
    add_names_flag(add)
    return add


def add_outside_flag(add):
    text = "follow paths of metadata and catalog that leave their folder by ../ or from /"
    add("--allow-outside-root", action="store_true", help=text)


def add_names_flag(add):
    text = "take class folders in sorted order even if their names contradict labels.json"
    add("--ignore-folder-names", action="store_true", help=text)


# ---------------------------------------------------------------------------------------------
# Labelled images


class Views(Dataset):
    """A labelled set of PIL images as (view(image), label)."""

    def __init__(self, images, view):
        self.images, self.view = images, view

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.view(image), label


class LabelledViews(Views):
    """A labelled set for training, by EpochSampler's keys: {"image", "label"}.

    The image is view(PIL image, generator); the generator's numbers depend on (seed, epoch, index)
    alone.
    """

    def __init__(self, images, view, seed=0):
        super().__init__(images, view)
        self.seed = seed

    def __getitem__(self, key):
        epoch, (index, *_) = key
        image, label = self.images[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        return {"image": self.view(image, rng), "label": label}


def dummy_batch(batch_size, size, device):
    """A prepared batch of LabelledViews, zeros of size x size pixels, to warm up with."""
    label = torch.zeros(batch_size, dtype=torch.long, device=device)
    return {"image": torch.zeros(batch_size, 3, size, size, device=device), "label": label}


def unchanged(image):
    return image


def load_image(path, archived=False):
    return decode_image(read_file("", str(path)), path, archived)


def is_archived(entry):
    """Whether the pixels of a set of the catalog are those of the archived code."""
    return entry.get("pixels") == "archived"


# ---------------------------------------------------------------------------------------------
# Layouts: one of CATALOG_TYPES each, (name, entry, split, transform, labels) -> dataset


def open_imagefolder(name, entry, split, transform, labels):
    """A folder a class: the sorted folders have the labels' order."""
    folder = os.path.join(entry["path"], split)
    loader = partial(load_image, archived=is_archived(entry))
    # Of another set's classes by number, folder 10 comes after folder 9.
    key = by_number if entry["labels"] != name else None
    dataset = ImageFolder(name, folder, transform, loader, key)
    check_labels(len(dataset.classes), labels, folder)
    return dataset


class FileList(Dataset):
    """<split>_images.npy (paths below root) and <split>_labels.npy (class numbers or names)."""

    def __init__(self, name, entry, split, transform, labels):
        self.root, self.transform, self.archived = entry["path"], transform, is_archived(entry)
        self.images, found = (
            read_metadata(os.path.join(self.root, f"{split}_{part}.npy"), read_npy)
            for part in ("images", "labels")
        )
        if len(self.images) != len(found):
            raise InputError(
                f"{name}: {split}_images.npy has {len(self.images)} rows, but "
                f"{split}_labels.npy {len(found)}; they must agree"
            )
        for image in self.images:
            what, allowed = f"{self.root}/{split}_images.npy: image", entry.get("allow_outside")
            check_inside(self.root, str(image), what, allowed)
        self.labels = class_numbers(found, labels, f"{self.root}/{split}_labels.npy")

    @property
    def class_to_idx(self):
        """{name of a folder whose images are all of one class: its number}, as ImageFolder's."""
        numbers = {}
        for image, label in zip(self.images, self.labels, strict=True):
            folder = os.path.basename(os.path.dirname(str(image)))
            numbers.setdefault(folder, set()).add(label)
        return {folder: min(found) for folder, found in numbers.items() if len(found) == 1}

    def __len__(self):
        return len(self.images)

    @property
    def samples(self):
        paths = (os.path.join(self.root, str(image)) for image in self.images)
        return list(zip(paths, self.labels, strict=True))

    def __getitem__(self, index):
        image = load_image(os.path.join(self.root, str(self.images[index])), self.archived)
        return self.transform(image), self.labels[index]


CATALOG_TYPES = {
    "imagefolder": open_imagefolder,
    "filelist": FileList,
    "torchvision": open_torchvision,
    "special": open_torchvision,  # the archived name
}


# ---------------------------------------------------------------------------------------------
# Opening a set


def find_entry(catalog, name):
    """The entry of a set that is there. Raises InputError for another."""
    if name not in catalog:
        raise InputError(f"unknown dataset {name!r}; choose from {', '.join(catalog)}")
    entry = catalog[name]
    if entry["type"] not in CATALOG_TYPES:
        raise InputError(
            f"catalog entry {name!r}: unknown type {entry['type']!r}; choose from "
            f"{', '.join(CATALOG_TYPES)}"
        )
    if not is_present(entry):
        raise InputError(
            f"{name}: folder {entry['path']} is absent; put the set there or change its path in "
            "the catalog"
        )
    return entry


def classes_of(catalog, name, is_train, labels):
    """The list of the classes of a split; of another set's those that have a folder.

    Args:
        catalog: as load_catalog returns it.
        name: name of the set.
        is_train: bool, the training or the test split.
        labels: {name: classes}.
    """
    entry = find_entry(catalog, name)
    source = entry["labels"]
    if source not in labels:
        raise InputError(f"labels: unknown dataset {source!r}; choose from {', '.join(labels)}")
    check_names(source, labels[source])
    if source == name or entry["type"] != "imagefolder":
        return labels[source]
    folder = os.path.join(entry["path"], split_name(catalog, name, is_train))
    return shared_classes(name, source, class_folders(name, folder, by_number), labels[source])


def get_downstream_dataset(catalog, name, is_train, transform, labels):
    """Opens one split of a labelled set: a dataset of (transform(PIL image), class number).

    Args:
        catalog: as load_catalog returns it.
        name: name of the set.
        is_train: bool, the training or the test split.
        transform: function of a PIL image.
        labels: list of the set's classes, each a text or a list of synonyms.

    Raises InputError if the set is unknown or absent, or its classes are not those of `labels`.
    Says so if the names of its class folders confirm only some classes.
    """
    entry = find_entry(catalog, name)
    check_names(name, labels)
    split = split_name(catalog, name, is_train)
    dataset = CATALOG_TYPES[entry["type"]](name, entry, split, transform, labels)
    if not entry.get("ignore_names"):
        note_order(name, *map(tuple, check_order(name, dataset, labels)))
    return dataset


def open_splits(name, catalog, labels, allow_outside=False, ignore_names=False):
    """Opens both splits of a set of the catalog.

    Args:
        name: name of the set.
        catalog, labels: paths of the JSON files.
        allow_outside: bool, whether listed paths may leave their folder.
        ignore_names: bool, whether names of class folders may contradict the labels.

    Returns (training set, test set, classes): datasets of (PIL image, class number), and the list
    of labels.json. Raises InputError as get_downstream_dataset, and if both splits are the same.
    """
    table = read_json_object(labels, "labels")
    catalog = load_catalog(catalog, allow_outside, ignore_names)
    classes = [classes_of(catalog, name, is_train, table) for is_train in (True, False)]
    if classes[0] != classes[1]:
        raise InputError(f"{name}: train and test have other classes; a classifier needs the same")
    train, test = (
        get_downstream_dataset(catalog, name, is_train, unchanged, classes[0])
        for is_train in (True, False)
    )
    if (split := split_name(catalog, name, True)) == split_name(catalog, name, False):
        raise InputError(f"{name}: train and test are both {split!r}; correct the catalog")
    return train, test, classes[0]


def download_split(catalog, name, is_train, labels):
    """Opens a split of a set of type torchvision, downloaded if absent.

    Args:
        catalog: as load_catalog returns it.
        name: name of the set.
        is_train: bool, the training or the test split.
        labels: {name: classes}.

    Returns the dataset, or None if the set has no such split.
    """
    if name not in catalog or name not in labels:
        known = ", ".join(other for other in catalog if other in labels)
        raise InputError(f"unknown dataset {name!r}; choose from {known}")
    if CATALOG_TYPES.get(catalog[name]["type"]) is not open_torchvision:
        raise InputError(f"{name}: the catalog says type {catalog[name]['type']}, not torchvision")
    check_names(name, labels[name])
    split = split_name(catalog, name, is_train)
    if is_train and split is None:
        return None
    return open_torchvision(name, catalog[name], split, unchanged, labels[name], download=True)


def fingerprint(name, catalog, is_train, images):
    """A text that changes with a set's path, split and pixels, its files, their times and labels.

    Args:
        name: name of the set.
        catalog: as load_catalog returns it.
        is_train: bool, the training or the test split.
        images: the split as open_splits opens it.
    """
    entry, split = catalog[name], split_name(catalog, name, is_train)
    digest = hashlib.sha256(
        repr((entry["type"], entry["path"], split, entry.get("pixels"))).encode()
    )
    for path, label in images.samples:
        try:
            stat = os.stat(file_of(path))
            state = stat.st_size, stat.st_mtime_ns
        except OSError:  # an error for the reader of the image to report
            state = None
        digest.update(repr((path, label, state)).encode())
    return digest.hexdigest()
