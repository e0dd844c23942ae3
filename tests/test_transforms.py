"""Views: their parameters' distributions against torchvision's, and their determinism."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

import transforms
from utils import InputError

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
).resize((64, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("view", [transforms.RandomCrop, transforms.RandomAugment])
def test_a_view_depends_on_its_generator_alone(view):
    make = view(32)
    first, same, other = (make(PICTURE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [(64, 48), (500, 20)])
def test_crops_are_distributed_as_torchvisions(size):
    rng, scale = np.random.default_rng(0), (0.08, 1.0)
    torch.manual_seed(0)
    image = torch.zeros(3, size[1], size[0])
    ours = np.array([transforms.draw_crop(rng, *size, scale) for _ in range(4000)])
    theirs = [tv.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    for column_a, column_b in zip(ours.T, np.array(theirs).T, strict=True):
        quantiles = np.linspace(0.05, 0.95, 19)
        difference = np.quantile(column_a, quantiles) - np.quantile(column_b, quantiles)
        assert abs(difference).max() <= 0.05 * max(size)


def test_crops_stay_inside():
    rng = np.random.default_rng(0)
    for width, height in ((1, 1), (1, 500), (500, 1), (3, 2)):
        for _ in range(200):
            top, left, h, w = transforms.draw_crop(rng, width, height, (0.08, 1.0))
            assert top >= 0 and left >= 0 and h >= 1 and w >= 1
            assert top + h <= height and left + w <= width


def test_augmentation_is_drawn_with_the_papers_probabilities():
    rng, n = np.random.default_rng(0), 20_000
    drawn = [transforms.draw_augmentation(rng) for _ in range(n)]
    for key, p in (("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.5), ("flip", 0.5)):
        count = sum(d[key] not in (None, False) for d in drawn)
        assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5, key
    jitter = [d["jitter"] for d in drawn if d["jitter"]]
    for name, (_, (low, high)) in transforms.JITTER.items():
        values = np.array([j[name] for j in jitter])
        assert low <= values.min() and values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.02)
        first = sum(next(iter(j)) == name for j in jitter) / len(jitter)
        assert first == pytest.approx(0.25, abs=0.02)  # each operation comes first as often
    blur = np.array([d["blur"] for d in drawn if d["blur"]])
    assert blur.min() >= 0.1 and blur.max() <= 2.0 and blur.mean() == pytest.approx(1.05, abs=0.02)


def test_augment_applies_what_was_drawn():
    none = {"jitter": None, "grayscale": False, "blur": None, "flip": False}
    assert transforms.augment(PICTURE, **none) == PICTURE
    flipped = transforms.augment(PICTURE, **{**none, "flip": True})
    assert flipped == PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gray = np.array(transforms.augment(PICTURE, **{**none, "grayscale": True}))
    assert (gray[..., 0] == gray[..., 1]).all() and (gray[..., 0] == gray[..., 2]).all()
    blurred = np.array(transforms.augment(PICTURE, **{**none, "blur": 2.0}), dtype=float)
    assert np.diff(blurred, axis=0).std() < np.diff(np.array(PICTURE, dtype=float), axis=0).std()
    dark = transforms.augment(PICTURE, **{**none, "jitter": {"brightness": 0.6}})
    assert np.array(dark).mean() == pytest.approx(0.6 * np.array(PICTURE).mean(), abs=1)


def test_evaluation_view_and_normalisation_equal_torchvisions():
    ours = transforms.to_float(transforms.CenterCrop(32, 36)(PICTURE)[None])[0]
    theirs = tv.Compose(
        [
            tv.Resize(36),
            tv.CenterCrop(32),
            tv.ToTensor(),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(PICTURE)
    assert torch.allclose(ours, theirs, atol=1e-6)


def encoded(format="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    PICTURE.convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format, mode", [("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P")])
def test_any_picture_becomes_rgb(format, mode):
    assert transforms.decode_image(encoded(format, mode), "x").mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:-200], encoded("PNG")[:300]])
def test_an_image_that_cannot_be_read_is_named(data):
    with pytest.raises(InputError, match=r"image a/b\.jpg cannot be read"):
        transforms.decode_image(data, "a/b.jpg")
