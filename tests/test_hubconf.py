"""The few lines of Python that the README shows, beside open_clip, torch.hub and transformers."""

from pathlib import Path

import pytest
import torch
from launch import run_command
from PIL import Image
from test_pretrained import assert_same_model, save, small, small_clip, theirs  # noqa: F401
from torchvision.transforms import functional as TF

import models
import pretrained
from preprocessing import CLIP_PREPROCESSING
from pretrained import create_model_and_transforms


@pytest.fixture(scope="module")
def photograph():
    from sklearn.datasets import load_sample_image

    picture = Image.fromarray(load_sample_image("china.jpg"))
    return picture.crop((0, 0, 500, 427))  # almost square, so that crops of it differ


def test_transforms_equal_open_clips(photograph, monkeypatch):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    _, training, evaluation = create_model_and_transforms("SMALL", image_size=224)
    form = CLIP_PREPROCESSING
    peer = PreprocessCfg(size=224, mean=form.mean, std=form.std, interpolation="bicubic")
    theirs = image_transform_v2(peer, is_train=False)(photograph)
    ours, unit = evaluation(photograph), 1 / 255 / max(form.std)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= unit

    crop = image_transform_v2(peer, is_train=True).transforms[0]
    assert crop.scale == (form.crop_min, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    box, rest = (20, 30, 340, 320), image_transform_v2(peer, is_train=False).transforms[2:]
    monkeypatch.setattr("transforms.draw_crop", lambda *args: box)
    theirs = TF.resized_crop(photograph, *box, [224, 224], crop.interpolation)
    for step in rest:
        theirs = step(theirs)
    assert (training(photograph) - theirs).abs().max() <= unit


def test_a_model_and_its_transforms(tmp_path, photograph):
    model = small()
    path = save(tmp_path / "x.pt", theirs(model))
    for args in (("SMALL", str(path)), (f"SMALL:{path}",)):
        found, training, evaluation = create_model_and_transforms(*args)
        assert_same_model(found, model)
        assert training(photograph).shape == evaluation(photograph).shape == (3, 32, 32)
    torch.manual_seed(0)
    first = training(photograph)
    assert not torch.equal(training(photograph), first)
    torch.manual_seed(0)
    assert torch.equal(training(photograph), first)
    slip, _, _ = create_model_and_transforms("SLIP_VITTINY8")
    assert type(slip) is models.SLIP and not slip.training


# torch.hub loads from another folder; transformers looks for Hugging Face's datasets, which are
# installed, and finds ours in their place.
BESIDE = """
import importlib.metadata, sys, torch
model, _, transform = torch.hub.load({root!r}, "create_model_and_transforms", "VITTINY8",
                                     source="local")
tokenizer = torch.hub.load({root!r}, "get_tokenizer", "VITTINY8", source="local")
print(model.encode_text(tokenizer(["a dog"])).shape)

sys.path.insert(0, {root!r})
importlib.metadata.version("datasets")
import datasets
assert hasattr(datasets, "CaptionDataset")
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer, Trainer
import open_clip
print("ok")
"""


def test_torch_hub_and_transformers_beside_our_datasets(tmp_path):
    root = str(Path(pretrained.__file__).parent)
    (tmp_path / "beside.py").write_text(BESIDE.format(root=root))
    run = run_command(tmp_path / "beside.py", [], cwd=tmp_path)
    assert run.stdout == "torch.Size([1, 128])\nok\n", run.stderr
