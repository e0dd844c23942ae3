"""The catalog of labelled sets: its file, its types of sets, their classes and fingerprints."""

import importlib
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from helpers import save_image, write_folders
from PIL import Image

import utils
from catalog import (
    CATALOG,
    LABELS,
    download_split,
    fingerprint,
    get_downstream_dataset,
    load_catalog,
    load_image,
    open_splits,
)
from transforms import CenterCrop
from utils import InputError


def catalog_of(root, **entry):
    path = root / "catalog.json"
    path.write_text(
        json.dumps({"mine": {"path": "mine", "train": "train", "test": "val", **entry}})
    )
    return load_catalog(path)


def open_mine(catalog, labels, name="mine"):
    return get_downstream_dataset(catalog, name, False, CenterCrop(32), labels)


def test_imagefolder(tmp_path):
    write_folders(tmp_path / "mine/val", classes=3, each=2)
    dataset = open_mine(catalog_of(tmp_path, type="imagefolder"), ["a", "b", "c"])
    assert len(dataset) == 6
    assert dataset[5][0].shape == (3, 32, 32) and dataset[5][1] == 2


def test_the_fingerprint_of_a_filelist(tmp_path):
    """Its paths, their order, the labels and the files count, also when the files lie in a zip."""
    root, seen = tmp_path / "mine", []
    save_image(root / "a.png", 0)
    with zipfile.ZipFile(root / "b.zip", "w") as file:
        file.write(root / "a.png", "c.png")
    catalog = catalog_of(tmp_path, type="filelist")

    def note(images, labels):
        np.save(root / "val_images.npy", np.array(images))
        np.save(root / "val_labels.npy", np.array(labels))
        dataset = open_mine(catalog, ["a", "b"])
        seen.append(fingerprint("mine", catalog, False, dataset))

    note(["a.png", "b.zip/c.png"], [0, 1])
    note(["a.png", "b.zip/c.png"], [0, 1])
    assert seen[0] == seen[1]
    note(["b.zip/c.png", "a.png"], [1, 0])
    note(["a.png", "b.zip/c.png"], [1, 0])
    os.utime(root / "b.zip", ns=(0, 0))
    note(["a.png", "b.zip/c.png"], [0, 1])
    assert len(set(seen)) == 4


def test_filelist(tmp_path):
    for i in range(2):
        save_image(tmp_path / f"mine/{i}.png", i)
    np.save(tmp_path / "mine/val_images.npy", np.array(["0.png", "1.png"]))
    np.save(tmp_path / "mine/val_labels.npy", np.array([1, 0]))
    dataset = open_mine(catalog_of(tmp_path, type="filelist"), ["a", "b"])
    assert [dataset[i][1] for i in range(2)] == [1, 0]
    assert dataset[0][0].shape == (3, 32, 32)
    for wrong in ([0, 2], [-1, 0], ["a", "c"], []):
        np.save(tmp_path / "mine/val_labels.npy", np.array(wrong))
        with pytest.raises(InputError, match="labels.json|must agree"):
            open_mine(catalog_of(tmp_path, type="filelist"), ["a", "b"])
    np.save(tmp_path / "mine/val_labels.npy", np.array([1, 0, 1]))
    with pytest.raises(InputError, match="val_images.npy has 2 rows, but val_labels.npy 3"):
        open_mine(catalog_of(tmp_path, type="filelist"), ["a", "b"])


def test_clevr_counts_has_names_for_labels(tmp_path):
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine/val_images.npy", np.array(["0.png", "1.png", "2.png"]))
    np.save(tmp_path / "mine/val_labels.npy", np.array(["count_10", "count_3", "count_9"]))
    labels = utils.read_json(LABELS, "labels")["clevr_counts"]
    dataset = open_mine(catalog_of(tmp_path, type="filelist"), labels)
    assert dataset.labels == [0, 1, 7]


def test_sets_travel_to_spawned_workers(tmp_path):
    write_folders(tmp_path / "mine/val", classes=2, each=1)
    labelled = open_mine(catalog_of(tmp_path, type="imagefolder"), ["a", "b"])
    assert pickle.loads(pickle.dumps(labelled))[1][1] == 1


def test_bad_catalogs(tmp_path):
    catalog = catalog_of(tmp_path, type="imagefolder")
    with pytest.raises(InputError, match="unknown dataset 'other'; choose from mine"):
        open_mine(catalog, ["a"], "other")
    with pytest.raises(InputError, match="mine is absent; put the set there"):
        open_mine(catalog, ["a"])
    write_folders(tmp_path / "mine/val", classes=3, each=1)
    with pytest.raises(InputError, match="has 3 classes, but labels.json has 2"):
        open_mine(catalog, ["a", "b"])
    with pytest.raises(InputError, match="unknown type 'zip'; choose from imagefolder"):
        open_mine(catalog_of(tmp_path, type="zip"), ["a"])
    with pytest.raises(InputError, match="mine: .*absent: No such file"):
        open_mine(catalog_of(tmp_path, type="imagefolder", test="absent"), ["a"])
    (tmp_path / "catalog.json").write_text('{"mine": {"type": "imagefolder"}}')
    entry = {"type": "imagefolder", "path": "x", "labels": 5}
    (tmp_path / "catalog.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(InputError, match="catalog.json: 'mine': labels is no text: 5$"):
        load_catalog(tmp_path / "catalog.json")
    (tmp_path / "catalog.json").write_text('{"mine": {"type": "imagefolder"}}')
    with pytest.raises(InputError, match="entry 'mine' needs a type and a path"):
        load_catalog(tmp_path / "catalog.json")


def test_the_catalog_is_an_object(tmp_path):
    (tmp_path / "catalog.json").write_text("[]")
    with pytest.raises(InputError, match="no object of named sets"):
        load_catalog(tmp_path / "catalog.json")


def test_a_catalog_stays_in_its_folder(tmp_path):
    outside = f"{tmp_path}/outside"
    for path in ("../outside", "a/../../outside"):
        with pytest.raises(
            InputError, match=r"catalog .*'mine' '.*outside' leaves its folder .*allow"
        ):
            catalog_of(tmp_path, type="imagefolder", path=path)
    for path in (outside, "~/outside", "a/../inside"):  # the user names a folder
        assert catalog_of(tmp_path, type="imagefolder", path=path)
    for part in ("train", "test"):
        for split in ("../x", "a/../../../x", "/etc"):
            with pytest.raises(InputError, match="'mine' '.*' leaves its folder '.*mine'"):
                catalog_of(tmp_path, type="imagefolder", **{part: split})
    (tmp_path / "catalog.json").write_text(
        json.dumps({"mine": {"type": "filelist", "path": "../x", "test": "../../y"}})
    )
    catalog = load_catalog(tmp_path / "catalog.json", allow_outside=True)
    assert catalog["mine"]["path"] == f"{tmp_path}/../x"


@pytest.mark.parametrize("image", ["../out.png", "/etc/x.png", "a/../../out.png"])
def test_a_filelist_stays_in_its_folder(tmp_path, image):
    save_image(tmp_path / "out.png", 0)
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine/val_images.npy", np.array([image]))
    np.save(tmp_path / "mine/val_labels.npy", np.array([0]))
    catalog = catalog_of(tmp_path, type="filelist")
    with pytest.raises(InputError, match="mine/val_images.npy: image '.*' leaves its folder"):
        open_mine(catalog, ["a"])
    catalog = load_catalog(tmp_path / "catalog.json", allow_outside=True)
    assert open_mine(catalog, ["a"]).labels == [0]


@pytest.mark.parametrize(
    "script", ["main", "main_linear", "main_finetune", "eval_zeroshot", "eval_retrieval"]
)
def test_every_script_that_reads_such_paths_has_the_flag(script):
    parser = importlib.import_module(script).get_args_parser()
    needed = {"main_linear": "--pretrained x", "main_finetune": "--pretrained x"}
    needed |= {"eval_zeroshot": "--resume x", "eval_retrieval": "--resume x --captions x --root x"}
    flags = needed.get(script, "").split()
    assert not parser.parse_args(flags).allow_outside_root
    assert parser.parse_args([*flags, "--allow-outside-root"]).allow_outside_root


@pytest.mark.parametrize("label", [5, None, [], ["a", 5], [["a"]], {"a": 1}, "\ud800"])
def test_classes_are_texts(tmp_path, label):
    write_folders(tmp_path / "mine/val", classes=2, each=1)
    catalog = catalog_of(tmp_path, type="imagefolder")
    with pytest.raises(InputError, match="labels of 'mine': .* is neither a text nor a list of te"):
        open_mine(catalog, ["a", label])
    catalog["cifar10"] = {"type": "torchvision", "path": str(tmp_path)}
    with pytest.raises(InputError, match="labels of 'cifar10'"):
        download_split(catalog, "cifar10", True, {"cifar10": ["a", label]})


def test_labels_are_an_object(tmp_path):
    (tmp_path / "labels.json").write_text('["mine"]')
    with pytest.raises(InputError, match="labels.json is no JSON object of named entries"):
        open_splits("mine", CATALOG, tmp_path / "labels.json")


def test_images_are_read_from_any_mode(tmp_path):
    Image.new("LA", (8, 8)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").mode == "RGB"


def test_a_folder_of_every_format_without_the_files_of_file_managers(tmp_path, capsys):
    root = tmp_path / ".cache/mine"  # the user's own choice
    for name in ("a/1.JPG", "a/deep/2.gif", "a/3.avif", "b/4.jfif", "b/5.webp", "b/6.tif"):
        save_image(root / "val" / name.replace("jfif", "jpg"), 0)
    (root / "val/b/4.jpg").rename(root / "val/b/4.jfif")
    for name in (
        ".ipynb_checkpoints/x.png", "@eaDir/x.png", "__MACOSX/x.png", ".hidden/x.png",
        "a/.ipynb_checkpoints/x.png", "a/@eaDir/1.JPG/x.jpg", "a/__MACOSX/x.png", "b/._4.jpg",
    ):  # fmt: skip
        save_image(root / "val" / name, 0)
    (root / "val/a/Thumbs.db").write_bytes(b"")
    (root / "val/b/notes.txt").write_text("x")
    (root / "val/README").write_text("x")
    entry = {"path": str(root), "type": "imagefolder"}
    images = open_mine(catalog_of(tmp_path, **entry), ["a", "b"])
    found = [(os.path.relpath(path, root / "val"), label) for path, label in images.samples]
    assert found == [
        ("a/1.JPG", 0), ("a/3.avif", 0), ("a/deep/2.gif", 0),
        ("b/4.jfif", 1), ("b/5.webp", 1), ("b/6.tif", 1),
    ]  # fmt: skip
    assert [images[i][0].shape for i in range(6)] == [(3, 32, 32)] * 6
    assert capsys.readouterr().out == (f"mine: left out of {root}/val: 2 files (1 .db, 1 .txt)\n")
    save_image(root / "val/c/._x.png", 0)
    with pytest.raises(InputError, match="mine: .*val/c has no image; check the folder"):
        open_mine(catalog_of(tmp_path, **entry), ["a", "b", "c"])


def test_the_pixels_of_a_set_are_upright_or_archived(tmp_path):
    with pytest.raises(InputError, match="'mine': pixels are upright or archived: x"):
        catalog_of(tmp_path, type="imagefolder", pixels="x")
