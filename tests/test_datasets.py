"""Samples of pre-training, their order over epochs and ranks, and the loader."""

import os
import pickle
import zipfile

import pytest
import torch
from helpers import save_image, write_coco
from torch.utils.data import DataLoader

import datasets
from captions import load_captions
from datasets import CaptionDataset, EpochSampler
from infra import distributed
from preprocessing import Preprocessing
from tokenizer import SimpleTokenizer
from utils import InputError

VIEWS = ("image", "text", "aug1", "aug2")
FORM = Preprocessing(image_size=32)
COLLATE = datasets.Collate(SimpleTokenizer())


def open_pairs(root, views=VIEWS, seed=0, augment="cpu"):
    captions = load_captions("coco", root / "captions.json")
    return CaptionDataset(captions, str(root), views, FORM, seed, augment)


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
    assert batches[0]["text"].shape == (4, 16)
    with_steps = ["aug1", "aug2"] if augment == "device" else []
    assert {v: x.shape for v, x in batches[0]["steps"].items()} == dict.fromkeys(
        with_steps, (4, 8, 3)
    )
    for workers in (2, 4):
        assert all(map(equal, batches, loader_of(dataset, workers)))
    for rank in (0, 1):
        halves = loader_of(dataset, 2 * rank, 2, rank=rank, world_size=2)
        for whole, half in zip(batches, halves, strict=True):
            rows = slice(2 * rank, 2 * rank + 2)
            assert equal({v: whole[v][rows] for v in VIEWS}, {v: half[v] for v in VIEWS})
            steps = {v: x[rows] for v, x in whole["steps"].items()}
            assert equal(steps, half["steps"])
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
    with pytest.raises(InputError, match="8 samples in a row cannot be read; check the root; im"):
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
    dataset = CaptionDataset(captions, str(tmp_path), VIEWS, FORM)
    assert dataset[0, [0]]["bad"] == []
    for index, reason in ((1, "end is missing"), (2, "checksum"), (3, "no item named")):
        sample = dataset[0, [index, 0]]
        assert reason in sample["bad"][0] and len(sample["bad"]) == 1
        assert torch.equal(sample["aug1"], dataset[0, [0]]["aug1"])


def test_the_root_is_a_folder(tiny):
    captions = load_captions("coco", tiny / "captions.json")
    with pytest.raises(InputError, match="^root 'nowhere' is not a folder"):
        CaptionDataset(captions, "nowhere", VIEWS, FORM)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_metadata_that_leave_the_root_stop_the_run(tmp_path, capfd, workers):
    """They are no bad sample to pass over, and one line also from a loader's worker."""
    rows = "".join(f"train2017/{i:012d}.jpg,x\n" for i in range(7))
    write_coco(tmp_path / "root", 8)
    save_image(tmp_path / "out.jpg", 0)
    (tmp_path / "m.csv").write_text(f"filepath,title\n{rows}../out.jpg,x\n")
    captions, root = load_captions("csv", tmp_path / "m.csv"), str(tmp_path / "root")
    loader = loader_of(CaptionDataset(captions, root, VIEWS, FORM), workers)
    with pytest.raises(SystemExit) as stop:
        distributed.run_script(lambda: list(loader))
    assert stop.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"error: metadata: image '../out.jpg' leaves its folder '{root}'; correct it, or allow "
        "paths outside of the root if you trust it"
    )
    allowed = CaptionDataset(captions, root, VIEWS, FORM, allow_outside=True)
    assert [batch["bad"] for batch in loader_of(allowed, workers)] == [[], []]


def test_datasets_travel_to_spawned_workers(tiny):
    pairs = pickle.loads(pickle.dumps(open_pairs(tiny)))
    assert equal(pairs[0, [3]], open_pairs(tiny)[0, [3]])


# --- the loader ---------------------------------------------------------------------------------


def open_loader(dataset, workers=0, batch_size=4, update_freq=1, collate_fn=COLLATE):
    device = torch.device("cpu")
    return datasets.open_loader(dataset, batch_size, workers, device, update_freq, collate_fn)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_starts_at_any_batch(tiny, workers):
    """In any order of epochs, by one DataLoader, whose workers persist."""
    dataset = open_pairs(tiny, seed=3)
    loader = open_loader(dataset, workers)
    assert len(loader) == 4
    for epoch, batch in ((5, 0), (5, 2), (0, 3), (5, 4), (1, 0)):
        expected = list(loader_of(dataset, epoch=epoch))[batch:]
        batches = list(loader.start(epoch, batch))
        assert len(batches) == 4 - batch and all(map(equal, batches, expected))
        assert len(loader) == 4  # of the epoch, wherever it started
    processes = [worker.pid for worker in getattr(loader.loader._iterator, "_workers", ())]
    assert len(processes) == workers
    list(loader.start(2))
    assert processes == [w.pid for w in getattr(loader.loader._iterator, "_workers", ())]


def test_a_preview_moves_no_epoch(tiny):
    dataset = open_pairs(tiny, seed=3)
    loader, expected = open_loader(dataset), list(loader_of(dataset, epoch=5))
    batches = loader.start(5, 1)
    loader.preview(2)
    assert all(map(equal, batches, expected[1:])) and next(batches, None) is None


@pytest.mark.parametrize("augment", ["cpu", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_preview_has_the_first_samples_of_the_first_epoch(tiny, augment, workers):
    dataset = open_pairs(tiny, seed=3, augment=augment)
    loader = open_loader(dataset, workers)
    keys = list(loader_of(dataset, epoch=0).sampler)
    for number in (1, 6):
        expected = COLLATE([dataset[key] for key in keys[:number]])
        assert equal(loader.preview(number), expected)
        loader.start(3, 2)  # whatever epoch is next


def test_the_loader_of_another_dataset_collates_as_pytorch_does():
    class Numbers(torch.utils.data.Dataset):
        seed = 1

        def __len__(self):
            return 10

        def __getitem__(self, key):
            epoch, (index, *_) = key
            return {"image": torch.tensor(index), "label": epoch}

    loader = open_loader(Numbers(), batch_size=2, update_freq=2, collate_fn=None)
    assert (loader.images, loader.batch_size, loader.workers, len(loader)) == (10, 2, 0, 4)
    assert loader.augments_on_device is False
    batches = list(loader.start(7))
    assert [batch["label"].tolist() for batch in batches] == 4 * [[7, 7]]
    assert len({int(i) for batch in batches for i in batch["image"]}) == 8
    assert loader.preview(3)["image"].shape == (3,)


def test_the_face_of_a_loader_of_captions(tiny):
    for augment in ("cpu", "device"):
        loader = open_loader(open_pairs(tiny, augment=augment), workers=2)
        assert (loader.images, loader.batch_size, loader.workers) == (16, 4, 2)
        assert loader.augments_on_device is (augment == "device")


def test_whole_updates_of_whole_batches(tiny, monkeypatch):
    dataset = open_pairs(tiny)
    assert len(open_loader(dataset, batch_size=3)) == 5
    assert len(open_loader(dataset, batch_size=3, update_freq=2)) == 4
    monkeypatch.setattr(datasets, "get_world_size", lambda: 2)
    assert len(open_loader(dataset, batch_size=4)) == 2
    message = "^batch size 64 on 2 ranks is more than the 16 training images; lower it$"
    with pytest.raises(InputError, match=message):
        open_loader(dataset, batch_size=64)
    message = "^3 micro-batches per update are more than the 2 batches of an epoch; lower their n"
    with pytest.raises(InputError, match=message):
        open_loader(dataset, batch_size=4, update_freq=3)
