"""Layers of towers, and locks: open_clip's names, no gradient, evaluation mode, resume, two ranks."""

from argparse import Namespace

import pytest
import timm
import torch
from helpers import PeakMemory, assert_equal, exact_training, rows, step_losses, train, train_flags
from helpers import views_of, weights
from launch import run_script

import engine
import layers
import layouts
import models
from infra.logger import SilentLog
from towers import TOWERS, create_visual
from utils import InputError

NONE = Namespace(
    lock_image=False, lock_image_unlocked_groups=0, lock_text=False, lock_text_unlocked_layers=0
)
NONE.patch_dropout = 0.0


def locked_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def locked(name, **flags):
    """A model on no device, locked by the flags."""
    with torch.device("meta"):
        model = models.create_model(name, 32, 16)
    layers.lock_towers(model, Namespace(**vars(NONE) | flags))
    return model


# ---------------------------------------------------------------------------------------------
# Names


@pytest.fixture(scope="module")
def peers():
    """open_clip's models by name, on no device: function -> (model, {its names: ours})."""
    import open_clip

    def build(name):
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(name))
        layout = layouts.OPEN_CLIP_VIT if name.startswith("ViT") else layouts.OPEN_CLIP_RESNET
        names = [key for key, _ in model.named_parameters()]
        return model, layouts.rename(names, layout)

    return build


@pytest.mark.parametrize(
    "name, image, text",
    [
        *[("ViT-B-32", n, None) for n in (0, 1, 2, 3, 12, 13)],
        *[("ViT-B-32", None, n) for n in (0, 1, 2, 3, 12, 13)],
        ("RN50", 0, None),
        ("RN50", None, 5),
    ],
)
def test_locked_names_are_open_clips(peers, name, image, text):
    theirs, ours = peers(name)
    flags = {}
    if image is not None:
        theirs.lock_image_tower(unlocked_groups=image)
        flags |= {"lock_image": True, "lock_image_unlocked_groups": image}
    if text is not None:
        theirs.lock_text_tower(unlocked_layers=text)
        flags |= {"lock_text": True, "lock_text_unlocked_layers": text}
    found = locked_names(locked(f"CLIP_{name}", **flags))
    assert found == {ours[key] for key in locked_names(theirs)}
    assert found and "logit_scale" not in found


@pytest.mark.parametrize(
    "name, stem, blocks, last",
    [
        ("VITTINY8", "patch_embed.proj.weight", ["blocks.3"], "norm.weight"),
        ("RN50", "stem.conv1.conv.weight", ["stages.3.2.conv1_1x1.conv.weight"], "head.q.weight"),
        ("convnext_atto", "stem.0.weight", ["stages.3.blocks.1.conv_dw.weight"], "head.norm.bias"),
        ("resnet18", "conv1.weight", ["layer4.1.conv1.weight"], None),
        ("swin_tiny_patch4_window7_224", "patch_embed.norm.weight", None, "norm.weight"),
    ],
)
def test_every_parameter_of_a_tower_has_one_layer(name, stem, blocks, last):
    tower = TOWERS.get(name)
    with torch.device("meta"):
        visual = create_visual(tower) if tower else timm.create_model(name, num_classes=0)
    found = layers.image_layers(visual)
    assert stem in found.stem and (last in found.last if last else found.last == [])
    assert not blocks or set(blocks) <= set(found.blocks[-1])
    places = layers.places(visual, found.depths())
    assert places.keys() == dict(visual.named_parameters()).keys()
    assert set(places.values()) == {i for i, layer in enumerate(found.depths()) if layer}


@pytest.mark.parametrize(
    "model, flags, match",
    [
        ("SIMCLR_NANO8", {"lock_text": True}, "lock of the text tower: the model has none; omit"),
        (
            "CLIP_NANO8",
            {"lock_image_unlocked_groups": 2},
            "2 unlocked groups of the image tower: lock it as well",
        ),
        (
            "CLIP_NANO8",
            {"lock_text_unlocked_layers": 1},
            "1 unlocked groups of the text tower: lock it as well",
        ),
        (
            "CLIP_NANO8",
            {"lock_image": True, "lock_image_unlocked_groups": 4},
            "4 unlocked groups of the image tower: it has 4; leave 3 at most",
        ),
        ("CLIP_NANO8", {"lock_image": True, "lock_text": True}, "all of the model is locked; "),
        ("SLIP_NANO8", {"lock_image": True, "patch_dropout": 0.5}, "patch dropout: a locked"),
    ],
)
def test_locks_that_do_not_fit(model, flags, match):
    with pytest.raises(InputError, match=match) as error:
        locked(model, **flags)
    assert "\n" not in str(error.value)
