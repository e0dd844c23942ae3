"""Names of weights: the file that a string stands for, and the facts known before it is read.

    checkpoint.pt                   of a training run, ours or released with the paper
    model.safetensors               a state dict of open_clip's, OpenAI's or Hugging Face's layout
    ViT-B-32-quickgelu:FILE         such a file with the name of its tower, or of its model
    FOLDER                          with open_clip_config.json, or Hugging Face's config.json
    ViT-B-32:laion2b_s34b_b79k      NAME:TAG of pretrained.json
    hf-hub:org/name                 such a folder on Hugging Face's hub; @ and a revision may follow

The last two are downloaded into the hub's cache.
"""

import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from infra import hub
from model_configs import read_huggingface, read_open_clip, read_text_model, text_files
from models import METHODS, parse_name
from text_models import TextModel
from towers import CLIP_TOWERS, KNOWN, TOWERS
from utils import InputError, read_json, read_json_object

PRETRAINED = Path(__file__).with_name("pretrained.json")
CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIGS = {  # of a folder: its reader, and the names that the weights may have
    CONFIG: (read_open_clip, FILES),
    "config.json": (read_huggingface, ("model.safetensors", "pytorch_model.bin")),
}


def has_method(name):
    """Whether a name is METHOD_TOWER and not a tower's alone."""
    return name.partition("_")[0] in METHODS


def full_name(name):
    """METHOD_TOWER, of itself or of a tower's name, which then is CLIP's."""
    return name if has_method(name) else f"CLIP_{name}"


def tower_of(name):
    """The tower's name, of itself or of METHOD_TOWER."""
    return full_name(name).partition("_")[2]


def named(tower, quick_gelu):
    """The name of CLIP's tower or model with that activation; others have one alone."""
    return f"{tower}-quickgelu" if quick_gelu and tower_of(tower) in CLIP_TOWERS else tower


@dataclass(frozen=True)
class Place:
    """A file of weights, and what is known of its model before the file is read."""

    path: str
    name: str | None = None  # of its model or tower
    form: dict = field(default_factory=dict)  # fields of its preprocessing
    text_model: TextModel | None = None  # if its text tower is Hugging Face's


@cache
def known_weights():
    return read_json(PRETRAINED, "weights")["weights"]


def list_pretrained():
    """Each NAME:TAG of pretrained.json."""
    return list(known_weights())


def find_place(source):
    """The Place that a string names, downloaded if need be. Raises InputError if there is none."""
    head, _, rest = source.partition(":")
    if os.path.isdir(source):
        return place_in_folder(source)
    if head == "hf-hub" and not os.path.exists(source):
        return place_in_folder(fetch_folder(source, *rest.partition("@")[::2]))
    tags = tags_of(head)
    if tags and source == head and not os.path.exists(source):
        known = ", ".join(tags)
        raise InputError(f"{source} names no weights; give {source}:TAG, TAG of {known}, or a file")
    if not rest and not os.path.exists(source) and not os.path.splitext(source)[1]:
        raise InputError(
            f"{source!r} is no file and no tower; check the path, or choose from {KNOWN}"
        )
    if not rest or os.path.exists(source):
        return place_of_file(source)
    if rest in tags:
        return place_of_tag(source, tags[rest])
    if head not in TOWERS:
        parse_name(full_name(head))
    if os.path.exists(rest):
        return replace(place_of_file(rest), name=head)
    known = f"choose from {', '.join(tags)}, or give" if tags else "give"
    raise InputError(f"{source}: {rest!r} is no tag of {head} and no file; {known} a file")


def tags_of(name):
    """{tag: its row} of a tower; one named with -quickgelu has the tags trained with it."""
    tags = {}
    for key, row in known_weights().items():
        tower, _, tag = key.partition(":")
        is_named = name == tower or (row["quick_gelu"] and name == named(tower, True))
        if is_named:
            tags[tag] = row | {"tower": tower}
    return tags


def fetch_folder(source, repository, revision):
    try:
        config = hub.fetch(repository, [CONFIG], revision or None)
        for names in (FILES, *text_files(read_json_object(config, "configuration"))):
            hub.fetch(repository, names, revision or None)
    except InputError as error:
        raise InputError(f"{source}: {error}; download it elsewhere and give its folder") from error
    return os.path.dirname(config)


def place_of_tag(source, row):
    name = named(row["tower"], row["quick_gelu"])
    try:
        path = hub.fetch(row["repository"], FILES)
    except InputError as error:
        also = f", or {row['url']}," if row["url"] else ""
        raise InputError(
            f"{source}: {error}; download that file{also} elsewhere and give {name}:FILE"
        ) from error
    return place_of_row(path, row["tower"], row)


def place_of_row(path, tower, row):
    """The Place of weights that pretrained.json lists."""
    activation = "quick_gelu" if row["quick_gelu"] else "gelu"
    form = {"mean": row["mean"], "std": row["std"], "activation": activation}
    return Place(path, named(tower, row["quick_gelu"]), form)


def place_of_file(path):
    """A file that open_clip released is known by its name, which ends in a checksum."""
    for key, row in known_weights().items():
        is_release = row["url"] and "/releases/" in row["url"]
        if is_release and os.path.basename(path) == os.path.basename(row["url"]):
            return place_of_row(path, key.partition(":")[0], row)
    return Place(path)


def place_in_folder(folder):
    """Of a folder in open_clip's form, ours (export.py) or another's, or in Hugging Face's."""
    present = [name for name in CONFIGS if os.path.exists(os.path.join(folder, name))]
    if not present:
        known = " or ".join(CONFIGS)
        raise InputError(f"folder {folder} has no {known}; choose another, or one of its files")
    read, names = CONFIGS[present[0]]
    path = os.path.join(folder, present[0])
    file = next((f for f in names if os.path.exists(os.path.join(folder, f))), None)
    if file is None:
        raise InputError(f"folder {folder} has none of {', '.join(names)}; check that it is whole")
    try:
        config = read_json_object(path, "configuration")
        name, form = read(config, folder)
        text_model = read_text_model(config, folder)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"configuration {path} is of another kind: {error!r}") from error
    except InputError as error:
        raise InputError(f"configuration {path}: {error}") from error
    return Place(os.path.join(folder, file), name and full_name(name), form, text_model)
