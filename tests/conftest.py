"""Small real files for the tests: a caption set, labelled sets, and ways to run the scripts."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent
REPOSITORY = HERE.parent


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


def train_flags(tiny, output_dir, *extra, model="SLIP_VITTINY8", epochs=1, val="digits"):
    """Flags of a small training run, for main.py's parser or command line."""
    flags = f"--dataset coco --root {tiny} --metadata {tiny}/captions.json --model {model} "
    flags += f"--catalog {tiny}/catalog.json --val-dataset {val} --output-dir {output_dir} "
    flags += f"--epochs {epochs} --batch-size 4 --ssl-mlp-dim 32 --ssl-emb-dim 16 --workers 0 "
    flags += "--print-freq 1 --device cpu --lr 1e-3"
    return [*flags.split(), *map(str, extra)]


def run_script(script, flags, ranks=1, cwd=REPOSITORY):
    """Runs a script as a user does; with several ranks through torchrun."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(REPOSITORY / script), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=240,
    )


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """What tests/ranks.py computed on two gloo ranks: {"one": ..., 0: ..., 1: ...}."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = run_script("tests/ranks.py", [folder]), run_script("tests/ranks.py", [folder], 2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    return {key: torch.load(folder / f"{key}.pt") for key in ("one", "rank0", "rank1")}
