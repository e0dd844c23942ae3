"""Data: caption sources for pre-training, and the catalog of labelled sets for evaluation.

Everything read here is a stranger's file: metadata is parsed as plain data, never executed, and
what does not fit raises an InputError that names the file and the row.
"""

import csv
import io
import itertools
import json
import os
import pickle
import zipfile
import zlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torchvision
from torch.utils.data import Dataset, Sampler, default_collate

from tokenizer import trim
from transforms import IMAGE_VIEWS, decode_image
from utils import InputError, read_json

# ---------------------------------------------------------------------------------------------
# Metadata files, read as plain data


def latin1(text, encoding):
    """How protocol-2 pickles spell bytes: the one use of _codecs.encode that is let through."""
    if encoding != "latin1":
        raise InputError(f"refused: it names the codec {encoding!r}")
    return text.encode("latin1")


class PlainDtype:
    """Stands for numpy.dtype: NumPy's own, fed with a hostile state, reads memory it should not."""

    def __init__(self, code, *flags):
        if code[:1] not in tuple("ObiufSU") or not code[1:].isdigit():
            raise ValueError(f"dtype {code!r} is not of plain numbers or text")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self):
        return np.dtype(self.order + self.code)


class PlainArray(list):
    """Stands for numpy.ndarray: the elements of an array of one dimension."""

    def __init__(self, *shape_and_code):
        super().__init__()

    def __setstate__(self, state):
        _, shape, dtype, _, data = state
        self[:] = data if isinstance(data, list) else np.frombuffer(data, dtype.numpy()).tolist()
        if tuple(shape) != (len(self),):
            raise ValueError(f"an array of shape {shape} holds {len(self)} elements")


def plain_array(kind, shape, code):
    return PlainArray()


def plain_scalar(dtype, data):
    return np.frombuffer(data, dtype.numpy())[0].item()


PLAIN_GLOBALS = {("_codecs", "encode"): latin1}
PLAIN_GLOBALS |= {("numpy", "ndarray"): PlainArray, ("numpy", "dtype"): PlainDtype}
for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    PLAIN_GLOBALS[f"{package}.multiarray", "_reconstruct"] = plain_array
    PLAIN_GLOBALS[f"{package}.multiarray", "scalar"] = plain_scalar


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers and strings, also from NumPy's arrays; nothing else."""

    def find_class(self, module, name):
        if (module, name) not in PLAIN_GLOBALS:
            raise InputError(f"refused: it names {module}.{name}, which is code and not data")
        return PLAIN_GLOBALS[module, name]


def read_pickle(file):
    return PlainUnpickler(file).load()


def read_npy(file):
    """The array in a .npy file; object arrays hold plain data only."""
    npy = np.lib.format
    is_first = npy.read_magic(file) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    if read_header(file)[2].hasobject:
        return read_pickle(file)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def read_metadata(path, parse):
    """parse(binary file), with every failure as an InputError that names the file."""
    try:
        with open(path, "rb") as file:
            return parse(file)
    except OSError as error:
        raise InputError(f"metadata {path}: {error.strerror}; check --metadata") from error
    except InputError as error:
        raise InputError(f"metadata {path} {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"metadata {path} does not parse ({type(error).__name__}: {error}); is it complete, "
            "and of the kind that --dataset expects?"
        ) from error


def read_rows(path, rows, pick):
    """pick(row) for each row; a row that lacks a field or has one of another kind is named."""
    try:
        rows = iter(rows)
    except TypeError:
        raise InputError(f"metadata {path} holds no list of rows; check --dataset") from None
    for number in itertools.count():
        try:
            image, captions = pick(next(rows))
            captions = [captions] if isinstance(captions, str) else list(captions)
            if not captions:
                raise ValueError("no caption")
            for text in (image, *captions):
                text.encode()  # fails on what is no text, and on half a surrogate pair
        except StopIteration:
            return
        except (
            LookupError,
            TypeError,
            ArithmeticError,
            ValueError,
            AttributeError,
            csv.Error,
        ) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"metadata {path}, row {number}: {reason}; a field is missing or of another kind"
            ) from error
        yield image, captions


# ---------------------------------------------------------------------------------------------
# Caption sources: one reader a set, (metadata path, columns) -> (image path, captions) pairs


def read_yfcc15m(path, columns):
    """Pickled list of (index, title, description); either text may be empty, and both count."""

    def pick(row):
        index, title, description = row
        name = f"{int(index):08d}"
        return f"images/{name[:2]}/{name[2:5]}.zip/{name[5:]}.jpg", [title, description]

    return read_rows(path, read_metadata(path, read_pickle), pick)


def read_coco(path, columns):
    """COCO's captions file: the captions of an image together, images in order of appearance."""
    captions = defaultdict(list)
    annotations = read_metadata(path, lambda file: json.load(file)["annotations"])

    def pick(row):
        return f"train2017/{int(row['image_id']):012d}.jpg", row["caption"]

    for image, caption in read_rows(path, annotations, pick):
        captions[image] += caption
    return captions.items()


def read_cc3m(path, columns):
    """.npy of dicts: image_id (a path), captions."""
    rows = read_metadata(path, read_npy)
    return read_rows(path, rows, lambda row: (str(row["image_id"]), row["captions"]))


def read_cc12m(path, columns):
    """.npy of dicts: image_name (a path), image_id, captions."""
    rows = read_metadata(path, read_npy)
    return read_rows(path, rows, lambda row: (str(row["image_name"]), row["captions"]))


def read_redcaps(path, columns):
    """JSON list of annotations: image_id, subreddit, caption."""

    def pick(row):
        return f"{row['subreddit']}/{row['image_id']}.jpg", row["caption"]

    return read_rows(path, read_metadata(path, json.load), pick)


def read_csv(path, columns):
    """A table with a header; the separator is the one that splits it into the named columns."""
    image_column, caption_column = columns
    text = read_metadata(path, lambda file: file.read().decode("utf-8-sig"))
    header = text.partition("\n")[0].rstrip("\r")
    for separator in "\t,;|":
        if {image_column, caption_column} <= set(next(csv.reader([header], delimiter=separator))):
            lines = io.StringIO(text, newline="")
            rows = csv.DictReader(lines, delimiter=separator, strict=True)
            return read_rows(path, rows, lambda row: (row[image_column], row[caption_column]))
    raise InputError(
        f"metadata {path}: no columns {image_column!r} and {caption_column!r} in its header "
        f"{header[:200]!r}; name them by --csv-img-key and --csv-caption-key"
    )


SOURCES = {
    "yfcc15m": read_yfcc15m,
    "coco": read_coco,
    "cc3m": read_cc3m,
    "cc12m": read_cc12m,
    "redcaps": read_redcaps,
    "csv": read_csv,
}


class Captions:
    """Image paths and their captions in Arrow columns, which forked workers share uncopied."""

    def __init__(self, pairs):
        text = pa.large_string()
        schema = pa.schema([("image", text), ("captions", pa.large_list(text))])
        pairs, batches = iter(pairs), []
        while chunk := list(itertools.islice(pairs, 2**16)):
            columns = [list(column) for column in zip(*chunk, strict=True)]
            batches.append(pa.record_batch(columns, schema=schema))
        table = pa.Table.from_batches(batches, schema).combine_chunks()
        self.image, self.captions = (column.combine_chunks() for column in table.columns)

    def __len__(self):
        return len(self.image)

    def __getitem__(self, index):
        return self.image[index].as_py(), self.captions[index].as_py()


def load_captions(dataset, metadata, columns=("filepath", "title")):
    """The Captions of a pre-training set. columns: image and caption column, for csv.

    Raises InputError for an unknown set, and for metadata that is absent, does not parse, lacks a
    field or is empty.
    """
    if dataset not in SOURCES:
        raise InputError(f"unknown dataset {dataset!r}; choose from {', '.join(SOURCES)}")
    captions = Captions(SOURCES[dataset](metadata, columns))
    if not len(captions):
        raise InputError(f"metadata {metadata} holds no image; check --metadata")
    return captions


# ---------------------------------------------------------------------------------------------
# Images


@lru_cache(maxsize=32)
def open_archive(path, process):
    """A zip with its directory, kept open; `process` keeps forked workers off a shared handle."""
    return zipfile.ZipFile(path)


def read_file(root, path):
    """The bytes of root/path, where path may lead into a zip ("images/12/345.zip/678.jpg")."""
    archive, inside, member = path.partition(".zip/")
    try:
        if inside:
            return open_archive(os.path.join(root, f"{archive}.zip"), os.getpid()).read(member)
        return Path(root, path).read_bytes()
    except OSError as error:
        message = error.strerror or error
        raise InputError(f"image {root}/{path}: {message}; check the path and the file") from error
    except (KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"image {root}/{path}: {error}; check the archive") from error


class CaptionDataset(Dataset):
    """Samples of pre-training: a dict of the views a method takes.

    The key of a sample is (epoch, index), and what it becomes depends on (seed, epoch, index)
    alone. Image views are (3, S, S) uint8, "text" is (77,) int64.
    """

    def __init__(self, captions, root, views, image_size, tokenizer, seed=0):
        if not os.path.isdir(root):
            raise InputError(f"--root {root!r} is not a folder; give the folder of the images")
        self.captions, self.root, self.tokenizer, self.seed = captions, root, tokenizer, seed
        self.image_views = {v: IMAGE_VIEWS[v](image_size) for v in views if v in IMAGE_VIEWS}
        self.with_text = "text" in views

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        path, captions = self.captions[index]
        image = decode_image(read_file(self.root, path), f"{self.root}/{path}")
        sample = {view: transform(image, rng) for view, transform in self.image_views.items()}
        if self.with_text:
            sample["text"] = self.tokenizer(captions[rng.integers(len(captions))])
        return sample


def collate(samples):
    """A batch of samples; captions are cut to the longest."""
    batch = default_collate(samples)
    if "text" in batch:
        batch["text"] = trim(batch["text"])
    return batch


class EpochSampler(Sampler):
    """One rank's (epoch, index) keys of a shuffled epoch of whole batches; set `epoch` first.

    Every run of world_size * batch_size indices is one global batch, cut into one block a rank:
    the same images whatever the number of ranks that share it.
    """

    def __init__(self, size, batch_size, batches, rank, world_size, seed=0):
        self.size, self.seed, self.epoch, self.rank = size, seed, 0, rank
        self.shape = (batches, world_size, batch_size)

    def __len__(self):
        return self.shape[0] * self.shape[2]

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        mine = order[: np.prod(self.shape)].reshape(self.shape)[:, self.rank]
        return ((self.epoch, index) for index in mine.ravel().tolist())


# ---------------------------------------------------------------------------------------------
# Labelled sets for evaluation

HERE = Path(__file__).parent
CATALOG, LABELS, TEMPLATES = (
    str(HERE / name) for name in ("dataset_catalog.json", "labels.json", "templates.json")
)


def load_catalog(path=CATALOG):
    """The catalog, {name: {"type", "path", "train", "test"}}; paths are relative to its file."""
    folder = os.path.dirname(os.path.abspath(path))
    catalog = read_json(path, "catalog")
    if not isinstance(catalog, dict):
        raise InputError(f"catalog {path} is no object of named sets; see dataset_catalog.json")
    for name, entry in catalog.items():
        texts = isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
        if not texts or not {"type", "path"} <= entry.keys():
            raise InputError(f"catalog {path}: entry {name!r} needs a type and a path, as texts")
        entry["path"] = os.path.join(folder, os.path.expanduser(entry["path"]))
    return catalog


def load_image(path):
    return decode_image(read_file("", str(path)), path)


def check_labels(found, labels, where):
    if found != len(labels):
        raise InputError(
            f"{where} has {found} classes, but labels.json has {len(labels)} for this set; "
            "check the folder or the labels"
        )


def open_imagefolder(name, entry, split, transform, labels):
    """torchvision's ImageFolder: the sorted class folders are the labels in order."""
    folder = os.path.join(entry["path"], split)
    try:
        dataset = torchvision.datasets.ImageFolder(folder, transform, loader=load_image)
    except FileNotFoundError as error:
        raise InputError(f"{name}: {error}; check the folder") from error
    check_labels(len(dataset.classes), labels, folder)
    return dataset


def class_numbers(found, labels, where):
    """Class numbers 0 to C-1 from numbers, or from names such as clevr_counts' "count_10"."""
    names = {label: i for i, label in enumerate(labels) if isinstance(label, str)}
    try:
        numbers = [
            names[label.removeprefix("count_")] if isinstance(label, str) else int(label)
            for label in np.asarray(found).tolist()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {error} is not in labels.json for this set") from error
    if not numbers or not 0 <= min(numbers) <= max(numbers) < len(labels):
        raise InputError(
            f"{where} holds classes {min(numbers, default='none')} to "
            f"{max(numbers, default='none')}, but labels.json has {len(labels)} for this set"
        )
    return numbers


class FileList(Dataset):
    """<split>_images.npy (paths below root) and <split>_labels.npy (class numbers or names)."""

    def __init__(self, name, entry, split, transform, labels):
        self.root, self.transform = entry["path"], transform
        self.images, found = (
            read_metadata(os.path.join(self.root, f"{split}_{part}.npy"), read_npy)
            for part in ("images", "labels")
        )
        if len(self.images) != len(found):
            raise InputError(
                f"{name}: {split}_images.npy has {len(self.images)} rows, but "
                f"{split}_labels.npy {len(found)}; they must agree"
            )
        self.labels = class_numbers(found, labels, f"{self.root}/{split}_labels.npy")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = load_image(os.path.join(self.root, str(self.images[index])))
        return self.transform(image), self.labels[index]


SPECIAL = {  # the sets that torchvision reads, (root, is_train) -> dataset
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "mnist": torchvision.datasets.MNIST,
    "stl10": lambda root, train: torchvision.datasets.STL10(root, "train" if train else "test"),
}


def to_rgb(image):
    return image.convert("RGB")


def open_special(name, entry, split, transform, labels):
    """A set in torchvision's own layout, its classes matched to labels.json by name."""
    if name not in SPECIAL:
        raise InputError(f"{name}: type special is for {', '.join(SPECIAL)}; use another type")
    try:
        dataset = SPECIAL[name](entry["path"], split == "train")
    except RuntimeError as error:
        raise InputError(f"{name}: {error} Looked in {entry['path']}") from error
    check_labels(len(dataset.classes), labels, entry["path"])
    # "aquarium_fish" is "aquarium fish", MNIST's "0 - zero" is "0"
    classes = [c.split(" - ")[0].replace("_", " ").lower() for c in dataset.classes]
    names = [label.lower() for label in labels]
    if sorted(classes) != sorted(names):
        unknown = sorted(set(classes) - set(names))
        raise InputError(f"{name}: classes {unknown} of {entry['path']} are not in labels.json")
    dataset.transform = torchvision.transforms.Compose([to_rgb, transform])
    dataset.target_transform = [names.index(c) for c in classes].__getitem__
    return dataset


CATALOG_TYPES = {"imagefolder": open_imagefolder, "filelist": FileList, "special": open_special}


def split_name(entry, is_train):
    """The folder or file prefix of the training or the evaluated split."""
    part = "train" if is_train else "test"
    return entry.get(part, part)


def is_present(entry):
    return os.path.isdir(entry["path"])


def get_downstream_dataset(catalog, name, is_train, transform, labels):
    """A labelled set of the catalog: items are (transform(PIL image), class number).

    Raises InputError if the set is unknown or absent, or its classes are not those of `labels`.
    """
    if name not in catalog:
        raise InputError(f"{name!r} is not in the catalog; choose from {', '.join(catalog)}")
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
    split = split_name(entry, is_train)
    return CATALOG_TYPES[entry["type"]](name, entry, split, transform, labels)
