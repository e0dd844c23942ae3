"""Fewer tokens: smaller images, with a last stage at full size, and patches left out."""

import pytest
import torch
from helpers import train, weights
from timm.layers import resample_abs_pos_embed

import main
import models
from pretrained import load_model
from utils import InputError


def test_the_blocks_see_the_patches_that_are_left():
    model, seen = models.create_model("SLIP_NANO8", patch_dropout=0.25), []
    model.visual.blocks[0].register_forward_hook(lambda block, args, x: seen.append(x.shape))
    images = torch.zeros(2, 3, 32, 32)
    model.forward_features(torch.ones(2, 4, dtype=torch.long), image=images, aug1=images)
    model.eval().encode_image(images)
    assert seen == [(4, 1 + 12, 64), (2, 1 + 16, 64)]  # of 16 patches and the class token


def test_a_run_on_small_images_is_trained_on_at_full_size(tiny, tmp_path):
    flags = ["--image-size", 16, "--patch-dropout", 0.5]
    small = train(tiny, tmp_path / "small", *flags, model="CLIP_NANO8")
    assert load_model(small / "checkpoint.pt")[0].image_size == 16
    start = ["--init-from", small / "checkpoint.pt", "--lr", 1e-12, "--lr-start", 0, "--wd", 0]
    start += ["--lr-end", 0]
    large = train(tiny, tmp_path / "large", *start, model="CLIP_NANO8", val="none")
    old, new = (weights(folder)["state_dict"] for folder in (small, large))
    resampled = resample_abs_pos_embed(old.pop("visual.pos_embed"), [4, 4], [2, 2])
    assert torch.allclose(new.pop("visual.pos_embed"), resampled, atol=1e-6)
    for key, value in old.items():
        assert torch.allclose(new[key], value, atol=1e-6), key
    assert weights(large)["preprocessing"]["image_size"] == 32

    with pytest.raises(InputError, match="trained with --image-size 16, not None; give the same"):
        train(tiny, small, model="CLIP_NANO8")


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--model CLIP_RN50 --patch-dropout 0.5", "resnet50_clip cannot leave out patches; omit p"),
        ("--model CLIP_convnext_atto --patch-dropout 0.5", "convnext_atto cannot leave out patche"),
        ("--model CLIP_NANO8 --image-size 30", "image size 30 is no multiple of the patch of 8 p"),
        ("--model CLIP_xcit_nano_12_p8_224 --image-size 30", "xcit_nano.* should divide image"),
        ("--patch-dropout 1", "argument --patch-dropout: 1 must be 0 or more and below 1"),
    ],
)
def test_a_tower_that_cannot_is_one_line(flags, match):
    with torch.device("meta"), pytest.raises(InputError, match=match):
        main.create_model(main.get_args_parser().parse_args(flags.split()))
