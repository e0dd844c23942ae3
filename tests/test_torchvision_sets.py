"""The sets that torchvision reads, from tiny copies: labels by name, splits, damage, downloads."""

import json
import os
import pickle

import pytest
import torchvision.datasets as tv
from torch.utils.data import DataLoader, Subset
from torchvision_copies import (
    LABELS,
    WRITERS,
    clevr_counts,
    country211,
    dtd,
    eurosat,
    food101,
    gtsrb,
    mnist,
    seen,
)

import catalog
import make_dataset
import torchvision_sets
from catalog import get_downstream_dataset, open_splits, unchanged
from torchvision_sets import SETS
from utils import InputError


@pytest.fixture
def no_checksums(monkeypatch):
    """The published files' checksums cannot be those of ours."""
    for dataset in (tv.Flowers102, tv.STL10, tv.CIFAR10):
        monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.fer2013.check_integrity", lambda *args, **kw: True)


def open_set(root, name, is_train=False, labels=None, **entry):
    catalog = {name: {"type": "torchvision", "path": str(root), **entry}}
    return get_downstream_dataset(catalog, name, is_train, unchanged, labels or LABELS[name])


def test_every_set_has_a_copy():
    assert set(WRITERS) == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_labels_are_those_of_the_pictures(name, tmp_path, no_checksums):
    WRITERS[name](tmp_path)
    for is_train in (False, True):
        if is_train and SETS[name].train is None:
            with pytest.raises(InputError, match=f"{name}: .* no training split of its own"):
                open_set(tmp_path, name, is_train)
            continue
        dataset = open_set(tmp_path, name, is_train)
        (_, numbers), *files = dataset.samples
        assert numbers == dataset.numbers and all(os.path.isfile(file) for file, _ in files)
        if name == "cifar10" and is_train:  # five files of one content
            dataset = [dataset[i] for i in range(10)]
        labels = [dataset[i][1] for i in range(len(dataset))]
        assert [seen(dataset[i][0]) for i in range(len(dataset))] == labels
        absent = len(SETS[name].unseen)
        assert sorted(labels) == list(range(absent, len(LABELS[name])))


def test_a_class_without_partner_is_an_error(tmp_path):
    eurosat(tmp_path)
    (tmp_path / "eurosat/2750/River").rename(tmp_path / "eurosat/2750/Canal")
    with pytest.raises(InputError, match=r"\['Canal'\] have no label, \['river'\] no class"):
        open_set(tmp_path, "eurosat")
    country211(tmp_path)
    with pytest.raises(InputError, match="country211: .* do not match"):
        open_set(tmp_path, "country211", labels=LABELS["country211"][:-1])
    gtsrb(tmp_path)
    with pytest.raises(InputError, match="torchvision has 43 classes, but labels.json 42"):
        open_set(tmp_path, "gtsrb", labels=LABELS["gtsrb"][:-1])
    with pytest.raises(InputError, match="do not match"):
        torchvision_sets.match_classes("x", ["a", "A"], ["a", "b"])


def test_other_splits_other_names_and_absent_sets(tmp_path):
    clevr_counts(tmp_path)
    assert len(open_set(tmp_path, "clevr_counts", test="train")) == 8
    with pytest.raises(
        InputError, match="unknown torchvision split 'test'; choose from train, val and correct"
    ):
        open_set(tmp_path, "clevr_counts", test="test")  # it is there, but without labels
    with pytest.raises(InputError, match="unknown torchvision set 'birdsnap'; choose from food101"):
        open_set(tmp_path, "birdsnap")
    with pytest.raises(InputError, match=r"food101: Dataset not found.* Looked in"):
        open_set(tmp_path, "food101")


@pytest.mark.parametrize("name", ["eurosat", "mnist", "dtd"])
def test_no_name_of_a_split_gives_another(name, tmp_path):
    WRITERS[name](tmp_path)
    if SETS[name].train is None:
        with pytest.raises(InputError, match=f"{name}: .* no training split of its own"):
            open_set(tmp_path, name, is_train=True, train="train")
    choices = ", ".join(SETS[name].splits)
    with pytest.raises(
        InputError, match=f"unknown torchvision split 'valid'; choose from {choices} and"
    ):
        open_set(tmp_path, name, test="valid")


def test_train_and_test_are_two_splits(tmp_path):
    food101(tmp_path)
    entry = {"type": "torchvision", "path": str(tmp_path), "train": "test"}
    (tmp_path / "catalog.json").write_text(json.dumps({"food101": entry}))
    with pytest.raises(InputError, match="food101: train and test are both 'test'; correct"):
        open_splits("food101", str(tmp_path / "catalog.json"), catalog.LABELS)


def test_countries_are_bound_by_name(tmp_path):
    country211(tmp_path)
    dataset = open_set(tmp_path, "country211", labels=LABELS["country211"][::-1])
    assert [210 - dataset[i][1] for i in (0, 9, 210)] == [seen(dataset[i][0]) for i in (0, 9, 210)]


def test_limits_of_distance_are_in_the_class_below():
    cars = [[{"type": "Car", "location": (0, 0, z)}] for z in (8.0, 8.1, 20.0, 20.1)]
    assert [*map(torchvision_sets.distance_class, cars)] == [0, 1, 1, 2]


def test_damaged_sets_are_told(tmp_path):
    eurosat(tmp_path)
    path = tmp_path / "eurosat/2750/River/River_1.jpg"
    path.write_bytes(b"no image")
    dataset = open_set(tmp_path, "eurosat")
    (index,) = [i for i, (found, _) in enumerate(dataset.dataset.samples) if found == str(path)]
    message = f"eurosat: image {index} cannot be read: .*River_1.jpg.*; replace or remove it"
    for workers in (0, 1):
        with pytest.raises(InputError, match=message):
            list(DataLoader(Subset(dataset, [index]), num_workers=workers))
    mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"no image")
    with pytest.raises(InputError, match="mnist: it is damaged: AssertionError.* Looked in"):
        open_set(tmp_path, "mnist")
    clevr_counts(tmp_path)
    (tmp_path / "clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json").write_text("{}")
    with pytest.raises(InputError, match="clevr_counts: it is damaged: KeyError.'scenes'"):
        open_set(tmp_path, "clevr_counts")


def test_sets_travel_to_spawned_workers(tmp_path):
    eurosat(tmp_path)
    dataset = open_set(tmp_path, "eurosat")
    assert pickle.loads(pickle.dumps(dataset))[3][1] == dataset[3][1]


def test_downloading_asks_torchvision(tmp_path, monkeypatch, capsys):
    def fetch(self):
        if not (tmp_path / "data/dtd").exists():
            dtd(tmp_path / "data")

    monkeypatch.setattr(tv.DTD, "_download", fetch)
    entries = {name: {"type": "torchvision", "path": "data"} for name in ("dtd", "eurosat")}
    entries["pets"] = {"type": "imagefolder", "path": "data"}
    (tmp_path / "catalog.json").write_text(json.dumps(entries))

    def call(*names):
        flags = ["download", "--catalog", str(tmp_path / "catalog.json"), "--datasets", *names]
        make_dataset.main(make_dataset.get_args_parser().parse_args(flags))

    call("dtd")
    said = capsys.readouterr().out.splitlines()
    assert said == [f"dtd: 47 images of {s} in {tmp_path}/data" for s in ("train", "test")]
    with pytest.raises(InputError, match="pets: the catalog says type imagefolder, not torch"):
        call("pets")
    with pytest.raises(InputError, match="unknown dataset 'x'; choose from dtd, eurosat, pets"):
        call("x")

    def fail(self):
        raise RuntimeError("no network")

    monkeypatch.setattr(tv.EuroSAT, "download", fail)
    with pytest.raises(InputError, match="eurosat: no network"):
        call("eurosat")


def test_messages_name_no_argument_of_python(tmp_path):
    """FER2013 can only be had from its publisher, and torchvision's constructor says where."""
    for name in SETS:
        for download in (False, True) if name == "fer2013" else (False,):
            entry, split = {"path": str(tmp_path)}, next(iter(SETS[name].splits))
            with pytest.raises(InputError) as error:
                torchvision_sets.open_torchvision(name, entry, split, None, LABELS[name], download)
            text = str(error.value)
            assert "download=" not in text and "keyword argument" not in text, text
            is_advised = "make_dataset.py can download it." in text or "http" in text
            assert is_advised or name == "cars"  # which nobody offers any more
