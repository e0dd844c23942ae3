"""Caption sources from real files, plain-data reading, sampling, and the catalog's types."""

import importlib
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import save_image, write_coco, write_folders
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import utils
from captions import load_captions
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
from datasets import CaptionDataset, EpochSampler
from infra import distributed
from tokenizer import SimpleTokenizer
from transforms import CenterCrop
from utils import InputError

VIEWS = ("image", "text", "aug1", "aug2")
COLLATE = datasets.Collate(SimpleTokenizer())


def open_pairs(root, views=VIEWS, seed=0, augment="cpu"):
    captions = load_captions("coco", root / "captions.json")
    return CaptionDataset(captions, str(root), views, 32, seed, augment)


def loader_of(dataset, workers=0, batch_size=4, epoch=5, rank=0, world_size=1):
    batches = len(dataset) // (batch_size * world_size)
    sampler = EpochSampler(len(dataset), batch_size, batches, rank, world_size, seed=3)
    sampler.go_to(epoch)
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=COLLATE)


def equal(a, b):
    """Whether two batches hold the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_an_epoch_can_begin_at_any_batch_of_a_rank():
    for rank in (0, 1):
        sampler = EpochSampler(50, 4, 6, rank, 2, seed=3)
        sampler.go_to(2)
        whole = list(sampler)
        for batch in range(7):
            sampler.go_to(2, batch)
            assert list(sampler) == whole[4 * batch :]
            assert len(sampler) == 24  # of the epoch: updates are counted by it


@pytest.mark.parametrize("augment", ["cpu", "device"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(tiny, augment):
    """Not on the number of workers, nor on which rank has it."""
    dataset = open_pairs(tiny, seed=3, augment=augment)
    loader = loader_of(dataset)
    batches = list(loader)
    assert batches[0]["text"].shape == (4, 16) and bool(batches[0]["steps"]) == (
        augment == "device"
    )
    for workers in (2, 4):
        assert all(map(equal, batches, loader_of(dataset, workers)))
    for rank in (0, 1):
        halves = loader_of(dataset, 2 * rank, 2, rank=rank, world_size=2)
        for whole, half in zip(batches, halves, strict=True):
            rows = slice(2 * rank, 2 * rank + 2)
            assert equal({v: whole[v][rows] for v in VIEWS}, {v: half[v] for v in VIEWS})
    for number, (epoch, indices) in enumerate(loader.sampler):
        assert epoch == 5
        expected, batch = dataset[5, indices[:1]], batches[number // 4]
        for view in ("image", "aug1", "aug2"):
            assert torch.equal(batch[view][number % 4], expected[view])
        assert torch.equal(batch["text"][number % 4], COLLATE.tokenizer(expected["text"])[:16])
    assert not torch.equal(dataset[5, [0]]["image"], dataset[6, [0]]["image"])
    assert not torch.equal(dataset[5, [0]]["aug1"], dataset[5, [0]]["aug2"])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-60])


def emptied(path):
    path.write_bytes(b"")


def no_image(path):
    path.write_bytes(b"<html>404 Not Found</html>")


@pytest.mark.parametrize("spoil", [truncated, emptied, no_image, os.unlink])
def test_a_broken_image_is_replaced_by_the_next_sample_of_the_epoch(tmp_path, spoil):
    write_coco(tmp_path, 8)
    dataset = open_pairs(tmp_path)
    keys = list(loader_of(dataset).sampler)
    first, second, third = keys[2][1][:3]
    assert second == keys[3][1][0] and third == keys[4][1][0]
    expected = dataset[5, [third]]
    for index in (first, second):
        spoil(tmp_path / f"train2017/{index:012d}.jpg")
    sample = dataset[keys[2]]
    reasons = sample.pop("bad")
    assert len(reasons) == 2 and f"{first:012d}.jpg" in reasons[0]
    assert equal(sample, {k: v for k, v in expected.items() if k != "bad"})
    batches = [list(loader_of(dataset, workers)) for workers in (0, 2)]
    assert equal(*batches)
    assert sum(len(batch["bad"]) for batch in batches[0]) == 3  # the second, too, has its turn
    for index in range(8):
        (tmp_path / f"train2017/{index:012d}.jpg").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"8 samples in a row cannot be read; check --root; image"):
        dataset[keys[2]]


def test_a_broken_archive_is_replaced(tmp_path):
    """Members of zips: truncated archive, damaged member, absent member."""
    save_image(tmp_path / "x.jpg", 0)
    rows = []
    for number, name in enumerate(("whole", "cut", "damaged", "lacking")):
        path = tmp_path / f"images/00/{number:03d}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "x.jpg", "000.jpg" if name != "lacking" else "001.jpg")
        data = bytearray(path.read_bytes())
        if name == "damaged":
            data[200] ^= 0xFF
        path.write_bytes(data[:-30] if name == "cut" else data)
        rows.append((number * 1000, name, ""))
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(rows))
    captions = load_captions("yfcc15m", tmp_path / "m.pkl")
    dataset = CaptionDataset(captions, str(tmp_path), VIEWS, 32)
    assert dataset[0, [0]]["bad"] == []
    for index, reason in ((1, "end is missing"), (2, "checksum"), (3, "no item named")):
        sample = dataset[0, [index, 0]]
        assert reason in sample["bad"][0] and len(sample["bad"]) == 1
        assert torch.equal(sample["aug1"], dataset[0, [0]]["aug1"])


def test_the_root_is_a_folder(tiny):
    captions = load_captions("coco", tiny / "captions.json")
    with pytest.raises(InputError, match="--root 'nowhere' is not a folder"):
        CaptionDataset(captions, "nowhere", VIEWS, 32)


def test_captions_are_drawn_evenly(tiny):
    dataset = open_pairs(tiny, views=("image", "text"))
    short = sum(len(dataset[epoch, [0]]["text"]) < 12 for epoch in range(200))
    assert 60 < short < 140


def test_global_batches_are_the_same_on_any_number_of_ranks():
    def global_batches(world_size, batch_size):
        ranks = [
            list(EpochSampler(103, batch_size, 12 // world_size * 2, rank, world_size, seed=1))
            for rank in range(world_size)
        ]
        steps = [
            [r[i : i + batch_size] for r in ranks] for i in range(0, len(ranks[0]), batch_size)
        ]
        return [[key for part in step for key in part] for step in steps]

    one = [key for batch in global_batches(1, 4) for key in batch]
    assert len(one) == len(set(one)) == 96
    sampler = EpochSampler(103, 8, 12, 0, 1, seed=1)
    whole = list(sampler)
    halves = [list(EpochSampler(103, 4, 12, rank, 2, seed=1)) for rank in (0, 1)]
    for step in range(12):
        both = halves[0][4 * step : 4 * step + 4] + halves[1][4 * step : 4 * step + 4]
        assert both == whole[8 * step : 8 * step + 8]
    sampler.go_to(1)
    assert [i for _, i in sampler] != [i for _, i in whole]


# --- the catalog --------------------------------------------------------------------------------


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
    """Its paths, their order, the labels and the files count, also where these lie in a zip."""
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


def test_datasets_travel_to_spawned_workers(tiny, tmp_path):
    pairs = pickle.loads(pickle.dumps(open_pairs(tiny)))
    assert equal(pairs[0, [3]], open_pairs(tiny)[0, [3]])
    write_folders(tmp_path / "mine/val", classes=2, each=1)
    labelled = open_mine(catalog_of(tmp_path, type="imagefolder"), ["a", "b"])
    assert pickle.loads(pickle.dumps(labelled))[1][1] == 1


def test_bad_catalogs(tmp_path):
    catalog = catalog_of(tmp_path, type="imagefolder")
    with pytest.raises(InputError, match="'other' is not in the catalog; choose from mine"):
        open_mine(catalog, ["a"], "other")
    with pytest.raises(InputError, match="mine is absent; put the set there"):
        open_mine(catalog, ["a"])
    write_folders(tmp_path / "mine/val", classes=3, each=1)
    with pytest.raises(InputError, match="has 3 classes, but labels.json has 2"):
        open_mine(catalog, ["a", "b"])
    with pytest.raises(InputError, match="unknown type 'zip'; choose from imagefolder"):
        open_mine(catalog_of(tmp_path, type="zip"), ["a"])
    with pytest.raises(InputError, match="mine: .*No such file.*absent"):
        open_mine(catalog_of(tmp_path, type="imagefolder", test="absent"), ["a"])
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


@pytest.mark.parametrize("workers", [0, 2])
def test_metadata_that_leave_the_root_stop_the_run(tmp_path, capfd, workers):
    """They are no bad sample to pass over, and one line also from a loader's worker."""
    rows = "".join(f"train2017/{i:012d}.jpg,x\n" for i in range(7))
    write_coco(tmp_path / "root", 8)
    save_image(tmp_path / "out.jpg", 0)
    (tmp_path / "m.csv").write_text(f"filepath,title\n{rows}../out.jpg,x\n")
    captions, root = load_captions("csv", tmp_path / "m.csv"), str(tmp_path / "root")
    loader = loader_of(CaptionDataset(captions, root, VIEWS, 32), workers)
    with pytest.raises(SystemExit) as stop:
        distributed.run_script(lambda: list(loader))
    assert stop.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: metadata: image '../out.jpg' leaves its folder '{root}'; correct it, or allow "
        "paths outside of the root if you trust it"
    )
    allowed = CaptionDataset(captions, root, VIEWS, 32, allow_outside=True)
    assert [batch["bad"] for batch in loader_of(allowed, workers)] == [[], []]


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
