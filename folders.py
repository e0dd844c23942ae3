"""A labelled set as a folder for each class, of every image format that Pillow reads."""

import os
from collections import Counter

from PIL import Image
from torch.utils.data import Dataset

from infra.distributed import is_main_process
from utils import InputError

# Formats that Pillow names, but reads by other programs or not at all.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_suffixes():
    """The ends of the names of images, such as ".jpg"."""
    known = Image.registered_extensions()  # imports Pillow's plugins
    return {s for s, form in known.items() if form in Image.OPEN and form not in NO_IMAGES}


def is_own(name):
    """Whether a file or folder is the user's, and not of a file manager, notebook or archiver."""
    return not name.startswith((".", "@")) and name != "__MACOSX"


def files_below(folder):
    """Yields (path, name) of the files below a folder, sorted; links are followed."""
    for path, _, names in sorted(os.walk(folder, followlinks=True)):
        inner = os.path.relpath(path, folder)
        if inner == "." or all(map(is_own, inner.split(os.sep))):
            yield from ((os.path.join(path, name), name) for name in sorted(names))


def by_number(name):
    """A key of sorted(): numbers by their value, before all other names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def class_folders(name, folder, key=None):
    """The names of the class folders of a set, sorted by `key`."""
    try:
        inside = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"{name}: {folder}: {error.strerror}; check the folder") from error
    return sorted(filter(is_own, inside), key=key)


class ImageFolder(Dataset):
    """(transform(PIL image), class number); the class of a folder is its place in sorted order.

    Folders and files whose names begin with . or @, and __MACOSX, are passed over. One line tells
    the files that are left out because their name is not an image's.

    Args:
        name: of the set.
        folder: with a folder for each class.
        transform: function of a PIL image.
        loader: function of a path that returns a PIL image.
        key: of the order, see class_folders.

    Attributes:
        classes: the names of the folders; class_to_idx: their numbers, as torchvision's.
        samples: list of (path, class number).

    Raises InputError if the folder or the images of a class are absent.
    """

    def __init__(self, name, folder, transform, loader, key=None):
        self.transform, self.loader = transform, loader
        self.classes = class_folders(name, folder, key)
        self.class_to_idx = {label: number for number, label in enumerate(self.classes)}
        self.samples, suffixes, others = [], image_suffixes(), Counter()
        for number, label in enumerate(self.classes):
            before = len(self.samples)
            for path, file in files_below(os.path.join(folder, label)):
                suffix = os.path.splitext(file)[1].lower()
                if is_own(file) and suffix in suffixes:
                    self.samples.append((path, number))
                elif is_own(file):
                    others[suffix or file] += 1
            if before == len(self.samples):
                raise InputError(f"{name}: {folder}/{label} has no image; check the folder")
        if not self.classes:
            raise InputError(f"{name}: {folder} has no folder of a class; check the folder")
        if others and is_main_process():
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(5))
            print(f"{name}: left out of {folder}: {others.total():,} files ({kinds})", flush=True)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, number = self.samples[index]
        return self.transform(self.loader(path)), number
