"""Caption sources from real files, plain-data reading, sampling, and the catalog's types."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import save_image, write_folders
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import utils
from datasets import CaptionDataset, EpochSampler, load_captions
from tokenizer import SimpleTokenizer
from transforms import CenterCrop
from utils import InputError

VIEWS = ("image", "text", "aug1", "aug2")


def picture(path, seed=0):
    save_image(path, seed)
    return path


def make_yfcc15m(root):
    picture(root / "456.jpg")
    (root / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(root / "images/00/123.zip", "w") as archive:
        archive.write(root / "456.jpg", "456.jpg")
    (root / "m.pkl").write_bytes(pickle.dumps([(123456, "a title", "")]))
    return "m.pkl", ("images/00/123.zip/456.jpg", ["a title", ""])


def make_coco(root):
    picture(root / "train2017/000000000042.jpg")
    rows = [{"image_id": 42, "caption": "a"}, {"image_id": 42, "caption": "b"}]
    (root / "m.json").write_text(json.dumps({"annotations": rows}))
    return "m.json", ("train2017/000000000042.jpg", ["a", "b"])


def make_cc3m(root):
    picture(root / "sub/1.jpg")
    rows = np.array([{"image_id": "sub/1.jpg", "captions": ["a", "b"]}], dtype=object)
    np.save(root / "m.npy", rows, allow_pickle=True)
    return "m.npy", ("sub/1.jpg", ["a", "b"])


def make_cc12m(root):
    picture(root / "sub/1.jpg")
    row = {"image_name": "sub/1.jpg", "image_id": np.int64(1), "captions": "only one"}
    np.save(root / "m.npy", np.array([row], dtype=object), allow_pickle=True)
    return "m.npy", ("sub/1.jpg", ["only one"])


def make_redcaps(root):
    picture(root / "birds/abc.jpg")
    row = {"image_id": "abc", "subreddit": "birds", "caption": "itap of a bird"}
    (root / "m.json").write_text(json.dumps([row]))
    return "m.json", ("birds/abc.jpg", ["itap of a bird"])


def make_csv(root):
    picture(root / "1.jpg")
    (root / "m.csv").write_text('id\tfilepath\ttitle\n7\t1.jpg\t"two, words"\n')
    return "m.csv", ("1.jpg", ["two, words"])


MAKERS = {
    "yfcc15m": make_yfcc15m,
    "coco": make_coco,
    "cc3m": make_cc3m,
    "cc12m": make_cc12m,
    "redcaps": make_redcaps,
    "csv": make_csv,
}


def open_pairs(name, metadata, root, views=VIEWS, seed=0):
    captions = load_captions(name, metadata)
    return CaptionDataset(captions, str(root), views, 32, SimpleTokenizer(), seed)


@pytest.mark.parametrize("name", datasets.SOURCES)
def test_every_source_reads_its_files(name, tmp_path):
    metadata, expected = MAKERS[name](tmp_path)
    dataset = open_pairs(name, tmp_path / metadata, tmp_path)
    assert len(dataset) == 1
    assert dataset.captions[0] == expected
    sample = dataset[0, 0]
    assert set(sample) == set(VIEWS)
    assert sample["text"].shape == (77,) and sample["text"].dtype == torch.int64
    for view in ("image", "aug1", "aug2"):
        assert sample[view].shape == (3, 32, 32) and sample[view].dtype == torch.uint8


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_separator_is_found(tmp_path, separator, newline):
    lines = [
        ["caption", "url", "image"],
        ["a\u2028dog\x0c", "x", "1.jpg"],
        ['"a\n  cat"', "y", "2.jpg"],
    ]
    text = newline.join(separator.join(line) for line in lines)
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    captions = load_captions("csv", tmp_path / "m.csv", ("image", "caption"))
    assert [captions[0], captions[1]] == [("1.jpg", ["a\u2028dog\x0c"]), ("2.jpg", ["a\n  cat"])]


def test_numpy_1_object_arrays_are_read(tmp_path):
    """Pickles of NumPy 1 name numpy.core; protocol 2 spells bytes by _codecs.encode."""
    rows = np.array([{"image_id": "1.jpg", "captions": ["a"]}], dtype=object)
    old = pickle.dumps(rows, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    with open(tmp_path / "m.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(old)
    assert b"numpy.core." in old and b"_codecs" in old
    assert load_captions("cc3m", tmp_path / "m.npy")[0] == ("1.jpg", ["a"])


class Crafted:
    """Pickles as a call of an allowed NumPy name, with arguments and a state of one's choice."""

    def __init__(self, function, arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        Crafted(np.dtype, ("V16", False, True), (3, "|", None, ("a",), {"a": ("O", 0)}, 16, 1, 0)),
        Crafted(np.ndarray, ((1,), np.dtype("O"), b"A" * 16)),
        Crafted(np.float64(0).__reduce__()[0], (np.dtype("O"), b"A" * 8)),
        np.zeros((2, 2)),
        np.array([{"captions": "a"}], dtype=object),
    ],
)
def test_numpys_own_objects_are_never_built(tmp_path, value):
    """Fed with a hostile state, NumPy's dtype and ndarray read memory that is not theirs."""
    (tmp_path / "m.pkl").write_bytes(pickle.dumps([(1, value, "b")]))
    with pytest.raises(InputError, match="does not parse|row 0"):
        load_captions("yfcc15m", tmp_path / "m.pkl")


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name, suffix", [("yfcc15m", "pkl"), ("cc3m", "npy"), ("cc12m", "npy")])
def test_hostile_metadata_is_refused_unexecuted(tmp_path, name, suffix):
    target, metadata = tmp_path / "executed", tmp_path / f"m.{suffix}"
    rows = np.array([{"image_id": Payload(target), "captions": ["a"]}], dtype=object)
    if suffix == "npy":
        np.save(metadata, rows, allow_pickle=True)
    else:
        metadata.write_bytes(pickle.dumps([(1, Payload(target), "b")]))
    with pytest.raises(InputError, match=r"m\.... refused: it names posix.mkdir"):
        load_captions(name, metadata)
    assert not target.exists()


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("nope", b"", "unknown dataset 'nope'; choose from yfcc15m, coco"),
        ("coco", None, "No such file or directory; check --metadata"),
        ("coco", b"{not json", "does not parse"),
        ("coco", b'{"images": []}', "does not parse.*annotations"),
        ("coco", b'{"annotations": []}', "holds no image"),
        ("coco", b'{"annotations": 3}', "no list of rows"),
        (
            "coco",
            b'{"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2}]}',
            "row 1: no 'caption'",
        ),
        ("coco", b'{"annotations": [{"image_id": "x", "caption": "a"}]}', "row 0: invalid literal"),
        ("coco", b'{"annotations": [{"image_id": 1, "caption": 5}]}', "row 0"),
        ("coco", b'{"annotations": [{"image_id": 1, "caption": "\\ud800"}]}', "row 0.*surrogates"),
        ("redcaps", b'[{"image_id": 1, "caption": "a"}]', "row 0: no 'subreddit'"),
        ("redcaps", b"[7]", "row 0"),
        ("yfcc15m", pickle.dumps([(1, "a", "b"), (2, "a")]), "row 1"),
        ("yfcc15m", pickle.dumps([(1, "a", None)]), "row 0: 'NoneType'"),
        ("yfcc15m", pickle.dumps([(1, "a", "b")])[:-4], "does not parse"),
        ("yfcc15m", b"", "does not parse"),
        ("cc3m", b"not npy", "does not parse"),
        ("csv", b"a,b\n1,2\n", "no columns 'filepath' and 'title' in its header 'a,b'"),
        ("csv", b"filepath,title\n1.jpg\n", "row 0"),
        ("csv", b"\xff\xfe\x00", "does not parse"),
        ("csv", b"filepath,title", "holds no image"),
        ("csv", b'filepath,title\n1.jpg,"a\n2.jpg,b\n', "row 0: unexpected end of data"),
        ("csv", b'filepath,title\n1.jpg,a\n2.jpg,"b" c\n', "row 1"),
    ],
)
def test_bad_metadata_is_one_line_that_names_file_and_row(tmp_path, name, content, match):
    path = tmp_path / "metadata"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        load_captions(name, path)
    assert "\n" not in str(error.value)


def test_bad_images_are_named(tmp_path):
    metadata, _ = make_coco(tmp_path)
    dataset = open_pairs("coco", tmp_path / metadata, tmp_path)
    path = tmp_path / "train2017/000000000042.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="000000000042.jpg cannot be read"):
        dataset[0, 0]
    path.unlink()
    with pytest.raises(InputError, match="000000000042.jpg: No such file"):
        dataset[0, 0]
    with pytest.raises(InputError, match="--root 'nowhere' is not a folder"):
        open_pairs("coco", tmp_path / metadata, "nowhere")


def test_bad_archives_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a.zip/1.jpg: File is not a zip file"):
        datasets.read_file(tmp_path, "a.zip/1.jpg")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("2.jpg", b"x")
    with pytest.raises(InputError, match="b.zip/1.jpg.*no item named"):
        datasets.read_file(tmp_path, "b.zip/1.jpg")
    with pytest.raises(InputError, match="c.zip/1.jpg: No such file"):
        datasets.read_file(tmp_path, "c.zip/1.jpg")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(tiny, workers):
    dataset = open_pairs("coco", tiny / "captions.json", tiny, seed=3)
    sampler = EpochSampler(len(dataset), 4, 4, rank=0, world_size=1, seed=3)
    sampler.epoch = 5
    loader = DataLoader(
        dataset, 4, sampler=sampler, num_workers=workers, collate_fn=datasets.collate
    )
    batches = list(loader)
    assert batches[0]["text"].shape == (4, 16)
    for number, (epoch, index) in enumerate(sampler):
        assert epoch == 5
        expected, batch = dataset[5, index], batches[number // 4]
        for view in ("image", "aug1", "aug2"):
            assert torch.equal(batch[view][number % 4], expected[view])
        assert torch.equal(batch["text"][number % 4], expected["text"][:16])
    assert not torch.equal(dataset[5, 0]["image"], dataset[6, 0]["image"])
    assert not torch.equal(dataset[5, 0]["aug1"], dataset[5, 0]["aug2"])


def test_captions_are_drawn_evenly(tiny):
    dataset = open_pairs("coco", tiny / "captions.json", tiny, views=("text",))
    short = sum(dataset[epoch, 0]["text"].argmax() < 5 for epoch in range(200))
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
    sampler.epoch = 1
    assert [i for _, i in sampler] != [i for _, i in whole]


# --- the catalog --------------------------------------------------------------------------------


def catalog_of(root, **entry):
    path = root / "catalog.json"
    path.write_text(
        json.dumps({"mine": {"path": "mine", "train": "train", "test": "val", **entry}})
    )
    return datasets.load_catalog(path)


def open_mine(catalog, labels, name="mine"):
    return datasets.get_downstream_dataset(catalog, name, False, CenterCrop(32), labels)


def test_imagefolder(tmp_path):
    write_folders(tmp_path / "mine/val", classes=3, each=2)
    dataset = open_mine(catalog_of(tmp_path, type="imagefolder"), ["a", "b", "c"])
    assert len(dataset) == 6
    assert dataset[5][0].shape == (3, 32, 32) and dataset[5][1] == 2


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
    labels = utils.read_json(datasets.LABELS, "labels")["clevr_counts"]
    dataset = open_mine(catalog_of(tmp_path, type="filelist"), labels)
    assert dataset.labels == [0, 1, 7]


def write_cifar10(root, classes):
    folder = root / "mine/cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    batch = {"data": pixels, "labels": list(range(10))}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))


def test_torchvisions_classes_are_matched_by_name(tmp_path, monkeypatch):
    labels = utils.read_json(datasets.LABELS, "labels")["cifar10"]
    write_cifar10(tmp_path, [*labels[5:], *labels[:5]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", load_meta)
    catalog = catalog_of(tmp_path, type="special")
    catalog["cifar10"] = catalog.pop("mine")
    dataset = open_mine(catalog, labels, "cifar10")
    assert [dataset[i][1] for i in range(10)] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"classes \['truck'\] .* not in labels.json"):
        open_mine(catalog, [*labels[:9], "lorry"], "cifar10")


def load_meta(self):
    """CIFAR10's own, without the checksum of the published file."""
    with open(os.path.join(self.root, self.base_folder, "batches.meta"), "rb") as file:
        self.classes = pickle.load(file)["label_names"]


def test_mnist_and_stl10(tmp_path, monkeypatch):
    raw = tmp_path / "mine/MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = bytes([0, 0, 8, 1]) + (10).to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(range(10)))
    catalog = catalog_of(tmp_path, type="special")
    catalog["mnist"] = catalog["mine"]
    labels = utils.read_json(datasets.LABELS, "labels")
    dataset = open_mine(catalog, labels["mnist"], "mnist")
    assert [dataset[i][1] for i in range(10)] == list(range(10))
    assert dataset[0][0].shape == (3, 32, 32)
    with pytest.raises(InputError, match="mine: type special is for cifar10"):
        open_mine(catalog, labels["mnist"])
    catalog["stl10"] = catalog["mine"]
    with pytest.raises(InputError, match="stl10: Dataset not found"):
        open_mine(catalog, labels["stl10"], "stl10")
    folder = tmp_path / "mine/stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(labels["stl10"]))
    (folder / "test_X.bin").write_bytes(bytes(2 * 3 * 96 * 96))
    (folder / "test_y.bin").write_bytes(bytes([10, 1]))  # counted from 1
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    dataset = open_mine(catalog, labels["stl10"], "stl10")
    assert [dataset[i][1] for i in range(2)] == [9, 0] and dataset[0][0].shape == (3, 32, 32)


def test_datasets_travel_to_spawned_workers(tiny, tmp_path):
    pairs = pickle.loads(pickle.dumps(open_pairs("coco", tiny / "captions.json", tiny)))
    expected = open_pairs("coco", tiny / "captions.json", tiny)[0, 3]
    assert all(torch.equal(value, expected[key]) for key, value in pairs[0, 3].items())
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
        datasets.load_catalog(tmp_path / "catalog.json")


def test_the_catalog_is_an_object(tmp_path):
    (tmp_path / "catalog.json").write_text("[]")
    with pytest.raises(InputError, match="no object of named sets"):
        datasets.load_catalog(tmp_path / "catalog.json")


def test_images_are_read_from_any_mode(tmp_path):
    Image.new("LA", (8, 8)).save(tmp_path / "x.png")
    assert datasets.load_image(tmp_path / "x.png").mode == "RGB"
