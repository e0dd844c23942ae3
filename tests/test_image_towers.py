"""Image towers from checkpoints of other projects: prefixes, heads, positions."""

from types import SimpleNamespace

import pytest
import timm
import torch
from test_layouts import assert_same, noise_like, random_weights

import image_towers
from utils import InputError


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", num_classes=0)


def below(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def heads(*names):
    return {name: torch.zeros(2, 2) for name in names}


LEFT_OUT = {
    "moco": ("module.base_encoder.", "module.momentum_encoder.", "head.0.weight"),
    "dino": ("teacher.backbone.", "student.backbone.", "mask_token"),
    "lightning": ("model.", "loss.", "projector.0.weight"),
    "ours": ("visual.", "image_mlp.", "head.bias"),
    "timm": ("", "optimizer.", "head.weight"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_an_image_tower_is_found_below_its_prefix(vit, kind):
    prefix, other, head = LEFT_OUT[kind]
    weights = random_weights(vit.state_dict())
    tensors = {f"{other}{key}": value + 1 for key, value in weights.items()}
    tensors |= below(prefix, weights | heads(head))
    if kind in ("lightning", "ours", "timm"):  # only one of them is a whole tower
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{other}blocks")}
        tensors |= {f"{other}queue": torch.zeros(2, 2)}
    if kind == "timm":
        tensors = weights | heads(head)
    found, notes = image_towers.image_tower(tensors, vit)
    assert_same(found, weights)
    assert notes[-1] == f"1 entries are left out: {head}"
    assert notes[:-1] == [f"the image tower is read from {prefix}*"] * bool(prefix)


def test_the_classifier_of_a_resnet_is_left_out():
    resnet = timm.create_model("test_resnet", num_classes=5)
    bare = timm.create_model("test_resnet", num_classes=0)
    found, notes = image_towers.image_tower(below("encoder.", resnet.state_dict()), bare)
    assert found.keys() == bare.state_dict().keys()
    assert notes[1] == "2 entries are left out: fc.weight, fc.bias"


def test_another_image_tower_is_refused(vit):
    weights = random_weights(vit.state_dict())
    short = {key: value for key, value in weights.items() if "norm1" not in key}
    for tensors, fault in (
        (short, r"12 keys missing: blocks.0.norm1.weight, blocks.0.norm1.bias, .*, \.\.\."),
        (weights | {"blocks.6.ls1.gamma": torch.zeros(1)}, "1 keys unknown: blocks.6.ls1.gamma"),
        (weights | {"norm_pre.weight": torch.zeros(1)}, "1 keys unknown: norm_pre.weight"),
        (weights | {"norm.weight": torch.zeros(1)}, "1 keys of another shape: norm.weight"),
        (weights | {"pos_embed": torch.zeros(1, 100, 64)}, "another shape: pos_embed"),
        ({"a": torch.zeros(1)}, "keys missing: cls_token, pos_embed"),
    ):
        with pytest.raises(InputError, match=f"are of another image tower .*{fault}"):
            image_towers.image_tower(below("net.", tensors), vit)


# ---------------------------------------------------------------------------------------------
# Positions


def test_positions_are_resampled_as_open_clip_does(vit):
    import open_clip

    weights = random_weights(vit.state_dict())
    larger = timm.create_model("test_vit", num_classes=0, img_size=224)
    peer = SimpleNamespace(visual=SimpleNamespace(grid_size=(14, 14)))
    theirs = {"visual.positional_embedding": weights["pos_embed"][0]}
    open_clip.factory.resize_pos_embed(theirs, peer)
    new = image_towers.resample_positions(below("visual.", weights), larger)["visual.pos_embed"]
    assert torch.allclose(new[0], theirs["visual.positional_embedding"], rtol=0, atol=1e-6)
    assert torch.equal(new[:, 0], weights["pos_embed"][:, 0])
    found, _ = image_towers.image_tower(below("model.", weights), larger)
    assert torch.equal(found["pos_embed"], new)
    assert_same(image_towers.resample_positions(weights, vit, prefix=""), weights)


def test_positions_of_an_attention_pool_are_resampled():
    with torch.device("meta"):
        small = timm.create_model("resnet50_clip", num_classes=0)
        large = timm.create_model("resnet50_clip", num_classes=0, img_size=288)
    old = noise_like("p", small.head.pos_embed)
    weights = {"visual.head.pos_embed": old}
    new = image_towers.resample_positions(weights, large)["visual.head.pos_embed"]
    expected = timm.layers.resample_abs_pos_embed(old[None], (9, 9))[0]
    assert new.shape == large.head.pos_embed.shape and torch.equal(new, expected)
    assert torch.equal(new[0], old[0])
    assert_same(image_towers.resample_positions(weights, small), weights)


def test_towers_without_positions_stay_as_they_are():
    convnext = timm.create_model("test_convnext", num_classes=0)
    weights = convnext.state_dict()
    assert image_towers.resample_positions(weights, convnext, prefix="") is weights
