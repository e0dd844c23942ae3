"""Small real files for the tests: a caption set, labelled sets, and ways to run the scripts."""

import functools
import hashlib
import json
import os
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from launch import run_script
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Sampler

import engine
import main
import models
import tests.warm  # noqa: F401
import utils
from runlog import SilentLog

torch.set_num_threads(1)  # pytest-xdist shares the cores out among processes

HERE = Path(__file__).parent


@functools.cache
def slurm_answers():
    try:
        sinfo = subprocess.run(["sinfo"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return sinfo.returncode == 0


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slurm") and not slurm_answers():
        pytest.skip("needs a Slurm cluster that answers sinfo; tests/slurm_cluster.py starts one")


def pytest_collection_modifyitems(items):
    """The longest test, which mostly waits for Slurm, is the first."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def reference():
    """Figures measured by running the archived code on `seeded_weights` and `seeded_images`."""
    return json.loads((HERE / "reference.json").read_text())


def seeded_weights(state_dict):
    """The weights behind reference.json: every tensor from a seed that its key gives."""

    def draw(key, value):
        if not value.is_floating_point():
            return value
        if key == "logit_scale":
            return torch.tensor(2.6593)
        seed = int(hashlib.sha256(f"dev:{key}".encode()).hexdigest()[:12], 16)
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        if key.endswith("running_var"):
            return noise.abs() + 0.5
        if value.ndim < 2:
            return 1 + 0.1 * noise if key.endswith("weight") else 0.02 * noise
        return noise * (value.shape[-1] ** -0.5 if value.ndim == 2 else 0.02)

    return {key: draw(key, value) for key, value in state_dict.items()}


def seeded_embeddings():
    """The embeddings behind reference.json's losses: 12 rows of 24."""
    generator = torch.Generator().manual_seed(13)
    names = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")
    return {name: torch.randn(12, 24, generator=generator) for name in names}


def save_image(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def write_coco(root, images=16):
    """A COCO layout of generated pictures, two captions each; returns the captions file."""
    annotations = []
    for i in range(images):
        save_image(root / f"train2017/{i:012d}.jpg", i)
        texts = (f"picture {i}", f"a photo of thing number {i}")
        annotations += [{"image_id": i, "caption": text} for text in texts]
    metadata = root / "captions.json"
    metadata.write_text(json.dumps({"annotations": annotations}))
    return metadata


def write_folders(root, classes=10, each=3):
    for c in range(classes):
        for i in range(each):
            save_image(root / f"{c}_class" / f"{i}.png", 100 * c + i)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a caption set, a labelled set named digits, and a catalog that lists it."""
    root = tmp_path_factory.mktemp("tiny")
    write_coco(root)
    write_folders(root / "digits" / "test")
    entry = {"path": "digits", "type": "imagefolder", "train": "train", "test": "test"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry}))
    return root


def train_flags(tiny, output_dir, *extra, model="SLIP_NANO8", epochs=1, val="digits"):
    """Flags of a small training run, for main.py's parser or command line."""
    flags = f"--dataset coco --root {tiny} --metadata {tiny}/captions.json --model {model} "
    flags += f"--catalog {tiny}/catalog.json --val-dataset {val} --output-dir {output_dir} "
    flags += f"--epochs {epochs} --batch-size 4 --ssl-mlp-dim 32 --ssl-emb-dim 16 --workers 0 "
    flags += "--print-freq 1 --device cpu --lr 1e-3"
    return [*flags.split(), *map(str, extra)]


def without_folder(flags):
    """The same for run_with_submitit.py, which chooses the folder."""
    at = flags.index("--output-dir")
    return flags[:at] + flags[at + 2 :]


@pytest.fixture(scope="session")
def probed(tiny, tmp_path_factory):
    """A folder with a barely trained checkpoint, and a labelled set of two splits."""
    root = tmp_path_factory.mktemp("probed")
    main.main(main.get_args_parser().parse_args(train_flags(tiny, root / "run", val="none")))
    write_folders(root / "digits/train", each=4)
    write_folders(root / "digits/test", each=3)
    entry = {"path": "digits", "type": "imagefolder"}
    absent = {"path": "digits", "type": "imagefolder", "train": "nowhere"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry, "mnist": absent}))
    return root


class Said(SilentLog):
    """A log that keeps the lines it is given."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


class InOrder(Sampler):
    """All rows of a set in their order, from a batch on."""

    def __init__(self, rows, batch_size):
        self.rows, self.batch_size, self.batch = rows, batch_size, 0

    def go_to(self, epoch, batch):
        self.batch = batch

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(range(self.batch * self.batch_size, len(self.rows)))


def exact_training(name, k, exact=True):
    """A small training in float64 that leaves the weights as they are."""
    torch.manual_seed(0)
    args = main.get_args_parser().parse_args(
        f"--model {name} --ssl-mlp-dim 32 --ssl-emb-dim 16 --update-freq {k} --lr 1e-12 "
        f"--lr-end 0 --wd 0 --epochs 1 --warmup-epochs 0 --gather-with-grad "
        f"--accum {'exact' if exact else 'plain'}".split()
    )
    model = models.create_model(name, args.ssl_mlp_dim, args.ssl_emb_dim).double()
    t = main.create_training(model, engine.Precision("fp32", torch.device("cpu")), 1, args)
    t.feed.prepare = lambda batch: batch
    return t


def views_of(model, rows, k):
    """k micro-batches that are this rank's share of `rows` random samples."""
    generator = torch.Generator().manual_seed(1)
    size, world_size = (rows, 3, model.image_size, model.image_size), utils.get_world_size()
    views = {v: torch.randn(size, generator=generator, dtype=torch.float64) for v in model.views}
    if "text" in views:
        views["text"] = torch.randint(1, 400, (rows, 16), generator=generator)
    mine = {v: x.chunk(world_size)[utils.get_rank()].chunk(k) for v, x in views.items()}
    return [{v: x[i] for v, x in mine.items()} for i in range(k)]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made within that live at once, on the CPU; `peak`."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.live:
                storage = tensor.untyped_storage()
                self.live.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def forget(self, key, size):
        self.live.discard(key)
        self.now -= size


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """What tests/ranks.py computed on two gloo ranks: {"one": ..., "rank0": ..., "rank1": ...}.

    Computed once for all of the processes that pytest-xdist shares the tests among.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            for ranks in (1, 2):
                run = run_script("tests/ranks.py", [folder], ranks)
                assert run.returncode == 0, run.stderr
    return {key: torch.load(folder / f"{key}.pt") for key in ("one", "rank0", "rank1")}
