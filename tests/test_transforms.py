"""Views: their parameters' distributions against torchvision's, and their determinism."""

import io
import itertools
import resource

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import transforms as tv

import decoding
import transforms
from benchmarks.augmentation import KernelCounter
from preprocessing import IMAGENET_MEAN, IMAGENET_STD
from utils import InputError

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
).resize((64, 48), Image.Resampling.BICUBIC)


def views(data, seed, augment):
    """The three views of an encoded picture: uint8 after PIL's steps, or crops and their steps."""
    image, rng = transforms.EncodedImage(data, "x"), np.random.default_rng(seed)
    drawn = [draw(rng, *image.size) for draw in transforms.IMAGE_VIEWS.values()]
    crops = image.crops([box for box, _ in drawn], 32)
    steps = [steps for _, steps in drawn]
    return [augment(crop, s) for crop, s in zip(crops, steps, strict=True)]


def test_a_view_depends_on_its_generator_alone():
    first, same, other = (views(encoded(), seed, transforms.augment) for seed in (1, 1, 2))
    for a, b, c in zip(first, same, other, strict=True):
        assert a.shape == (3, 32, 32) and a.dtype == torch.uint8 and a.is_contiguous()
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("box", [(0, 0, 48, 64), (5, 7, 20, 31), (10, 3, 9, 9)])
def test_crops_are_pillows(box):
    """Also where Pillow's memory is shared, and its fourth channel is left out."""
    image = transforms.EncodedImage(encoded("PNG"), "x")
    (ours,) = image.crops([box], 24)
    theirs = np.array(TF.resized_crop(PICTURE, *box, [24, 24])).astype(int)
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.02


def photograph(width, height):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    fine = rng.integers(-8, 9, (height, width, 3))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    buffer = io.BytesIO()
    Image.fromarray((pixels + fine).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PHOTO = photograph(120, 90)


def test_a_large_jpeg_is_decoded_smaller_where_it_does_not_show(monkeypatch):
    data = photograph(1600, 1200)
    boxes = [(100, 200, 900, 1000), (1, 3, 800, 801)]
    decoded, to_rgb = [], transforms.to_rgb

    def watched(image, archived):
        decoded.append(to_rgb(image, archived).size)
        return to_rgb(image, archived)

    monkeypatch.setattr(transforms, "to_rgb", watched)
    small = transforms.EncodedImage(data, "x").crops(boxes, 64)
    monkeypatch.setattr(transforms, "DRAFT_MARGIN", 100)
    full = transforms.EncodedImage(data, "x").crops(boxes, 64)
    assert decoded == [(400, 300), (1600, 1200)]
    for a, b in zip(small, full, strict=True):
        difference = (a.int() - b.int()).abs()
        assert difference.float().mean() < 0.5 and difference.max() <= 5
    with_detail = transforms.EncodedImage(data, "x").crops([*boxes, (0, 0, 190, 190)], 64)
    assert decoded[-1] == (1600, 1200) and len(with_detail) == 3


def test_shrunken_jpegs_differ_little_from_pillows_crops():
    """The figures of docs/differences.md; `pytest -s` prints them."""
    rng, differences = np.random.default_rng(0), []
    for width, height in ((800, 600), (1200, 900), (1600, 1200)):
        data = photograph(width, height)
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        for _ in range(8):
            box, _ = transforms.draw_image(rng, width, height)
            (ours,) = transforms.EncodedImage(data, "x").crops([box], 64)
            theirs = transforms.to_uint8(TF.resized_crop(whole, *box, [64, 64]))
            differences.append((ours.int() - theirs.int()).abs())
    worst = max(d.max().item() for d in differences)
    share = max((d > 1).float().mean().item() for d in differences)
    print(f"\nat most {worst}/255; over 1/255 in at most {share:.1%} of an image's values")
    assert worst <= 6 and share < 0.03


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("width, height", [(700, 40), (31, 600), (1000, 1), (3, 77)])
def test_a_very_long_picture_is_not_resized_whole(width, height, mode):
    """Its view is the same, to Pillow's rounding, which clips between its two passes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(64, 192, (height, width, 3), dtype=np.uint8))
    view = transforms.CenterCrop(32, 36, mode)
    expected = TF.center_crop(TF.resize(image, 36, TF.InterpolationMode(mode)), [32, 32])
    difference = (view(image).int() - transforms.to_uint8(expected).int()).abs()
    assert difference.max() <= 1


def test_a_very_long_picture_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((20_000, 1), (1, 20_000)):
        assert transforms.CenterCrop(224, 256)(Image.new("RGB", size)).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


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


def check_statistics(drawn, steps_of):
    """The paper's probabilities and ranges; drawn: what was applied to each of n samples."""
    n = len(drawn)

    def values(name):
        return np.array([v for d in drawn for step, v in steps_of(d) if step == name])

    for name, p in (("hue", 0.8), ("grayscale", 0.2), ("blur", 0.5), ("flip", 0.5)):
        assert abs(len(values(name)) - n * p) < 5 * (n * p * (1 - p)) ** 0.5, name
    for name, (low, high) in {**transforms.JITTER, "blur": (0.1, 2.0)}.items():
        found = values(name)
        assert low <= found.min() and found.max() <= high
        for q in (0.1, 0.25, 0.5, 0.75, 0.9):  # uniform
            assert np.quantile(found, q) == pytest.approx(
                low + q * (high - low), abs=0.025 * (high - low)
            )


def test_augmentation_is_drawn_with_the_papers_probabilities():
    rng = np.random.default_rng(0)
    drawn = [transforms.draw_augmentation(rng, 64, 48)[1] for _ in range(20_000)]
    check_statistics(drawn, lambda steps: [(name, value) for _, name, value in steps])
    jittered = [steps for steps in drawn if steps and steps[0][0] == 0]
    for name in transforms.JITTER:
        for place in range(4):  # each operation is in each place as often
            share = sum(steps[place][1] == name for steps in jittered) / len(jittered)
            assert share == pytest.approx(0.25, abs=0.02)
    assert all(a[0] < b[0] for steps in drawn for a, b in itertools.pairwise(steps))


def unpack(rows):
    """What pack_steps says of a sample, in the order that the device applies it: names, values."""
    names = ("contrast", "saturation")
    *blends, (shift, sigma, is_flipped) = rows.tolist()
    for place, (own, *others) in enumerate(blends):
        if place == 3 and shift:
            yield "hue", shift
        if any(others):
            assert own + sum(others) == pytest.approx(1)
            yield ("grayscale", 0.0) if not own else (names[others.index(sum(others))], own)
        elif own != 1:
            yield "brightness", own
    yield from [("blur", sigma)] * (sigma > 0) + [("flip", 0.0)] * (is_flipped == 1)


def test_batches_apply_the_same_steps_to_the_same_samples():
    """The device is handed what was drawn, over 20,000 samples."""
    rng = np.random.default_rng(1)
    drawn = [transforms.draw_augmentation(rng, 64, 48)[1] for _ in range(20_000)]
    packed = [[*unpack(rows)] for rows in transforms.pack_steps(drawn)]
    check_statistics(packed, lambda steps: steps)
    for ours, steps in zip(packed, drawn, strict=True):
        assert [name for name, _ in ours] == [name for _, name, _ in steps]
        assert [v for _, v in ours] == pytest.approx([v for *_, v in steps])


TORCHVISION = {  # on float tensors (3, S, S)
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grayscale": lambda image, _: TF.rgb_to_grayscale(image, 3),
    "blur": lambda image, sigma: TF.gaussian_blur(image, 2 * round(5 * sigma) + 3, sigma),
    "flip": lambda image, _: TF.hflip(image),
}
VALUES = {"hue": (-0.1, -0.03, 0.0, 0.1), "blur": (0.1, 0.7, 1.3, 2.0)}


ON_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
SLOTS = {"grayscale": 4, "blur": 5, "flip": 6}


def on_device(pixels, drawn):
    """What the device makes of a batch, (B, 3, S, S) in [0, 1]."""
    return transforms.augment_batch(pixels, transforms.pack_steps(drawn).to(pixels.device))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("name", TORCHVISION)
def test_each_step_on_the_device_equals_torchvisions(name, device):
    """In every slot that it may have, to float32's rounding and the ends of torchvision's blur."""
    values = VALUES.get(name, (0.6, 0.9, 1.0, 1.4))
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    images[1] = images[1, :1]  # gray: no hue
    images[2, :, :20], images[3, 0] = 0.0, 1.0
    expected = [TORCHVISION[name](x, v) for x, v in zip(images, values, strict=True)]
    for slot in [SLOTS[name]] if name in SLOTS else range(4):
        ours = on_device(images.to(device), [[(slot, name, v)] for v in values]).cpu()
        assert (ours - torch.stack(expected)).abs().max() <= 1e-5


def test_a_batch_on_the_device_equals_its_samples_by_torchvision():
    """Whole sequences of steps, each sample's own, against torchvision one after another."""
    rng = np.random.default_rng(3)
    pixels = torch.stack(
        [views(photograph(120, 90), i, lambda crop, _: crop)[1] for i in range(24)]
    )
    drawn = [transforms.draw_augmentation(rng, 120, 90)[1] for _ in pixels]
    ours = transforms.to_unit(pixels, transforms.pack_steps(drawn))
    for image, steps, result in zip(pixels, drawn, ours, strict=True):
        image = image.float() / 255
        for _, name, value in steps:
            image = TORCHVISION[name](image, value)
        assert (result - image).abs().max() <= 1e-4


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_samples_without_steps_keep_every_bit(device):
    """Alone, and beside samples that have all of them."""
    images = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(device)
    steps = [(slot, name, VALUES.get(name, [1.3])[0]) for slot, name in enumerate(TORCHVISION)]
    assert torch.equal(on_device(images, [[]] * 6), images)
    mixed = on_device(images, [[], steps, [], steps[-1:], steps[3:4], []])
    for i in (0, 2, 5):
        assert torch.equal(mixed[i], images[i])
    assert torch.equal(mixed[3], images[3].flip(-1))
    assert not torch.equal(mixed[1], images[1]) and not torch.equal(mixed[4], images[4])


def test_kernels_do_not_grow_with_what_was_drawn():
    rng = np.random.default_rng(0)
    counts = []
    for size in (2, 8, 64):
        drawn = [transforms.draw_augmentation(rng, 120, 90)[1] for _ in range(size)]
        for steps in (drawn, [[]] * size):
            with KernelCounter() as counter:
                on_device(torch.rand(size, 3, 16, 16), steps)
            counts.append(counter.kernels)
    assert len(set(counts)) == 1 and counts[0] < 140


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_compiled_steps_equal_uncompiled_ones(device):
    rng = np.random.default_rng(5)
    pixels = torch.from_numpy(rng.integers(0, 256, (8, 3, 24, 24), dtype=np.uint8)).to(device)
    drawn = [transforms.draw_augmentation(rng, 120, 90)[1] for _ in pixels]
    module, steps = transforms.Augment(), transforms.pack_steps(drawn).to(device)
    eager = module(pixels, steps)
    module.compile(dynamic=False)
    assert (module(pixels, steps) - eager).abs().max() <= 1e-5
    neutral = transforms.pack_steps([[]] * 8).to(device)
    assert torch.equal(module(pixels, neutral), transforms.to_unit(pixels))


def test_the_cpus_steps_are_the_devices_to_pillows_rounding():
    rng = np.random.default_rng(4)
    pixels = torch.stack([views(PHOTO, i, lambda crop, _: crop)[1] for i in range(48)])
    drawn = [transforms.draw_augmentation(rng, 120, 90)[1] for _ in pixels]
    for left_out, bound in (({"blur", "hue"}, 4), ({"blur"}, 20)):  # Pillow's hue has 8 bits
        steps = [[step for step in s if step[1] not in left_out] for s in drawn]
        device = transforms.to_unit(pixels, transforms.pack_steps(steps)) * 255
        cpu = torch.stack([transforms.augment(x, s) for x, s in zip(pixels, steps, strict=True)])
        difference = (device - cpu).abs()
        assert difference.max() <= bound and difference.mean() < 1.5


def test_views_on_the_device_are_brighter_than_pillows():
    """Pillow's steps truncate; `pytest -s` prints by how much that darkens its views."""
    rng = np.random.default_rng(4)
    pixels = torch.stack([views(PHOTO, i, lambda crop, _: crop)[1] for i in range(200)])
    drawn = [transforms.draw_augmentation(rng, 120, 90)[1] for _ in pixels]
    device = transforms.to_unit(pixels, transforms.pack_steps(drawn)) * 255
    cpu = torch.stack([transforms.augment(x, s) for x, s in zip(pixels, drawn, strict=True)])
    brighter = (device - cpu).mean().item()
    print(f"\nviews on the device are {brighter:.2f}/255 brighter on average")
    assert 0.8 < brighter < 1.4


@pytest.mark.parametrize("top, expected", [(0, 11), (32, 21)])
def test_pillows_blur_is_an_approximation(top, expected):
    """By up to 11/255 at a straight edge and 21/255 at a corner: README's row on --augment."""
    edge = torch.zeros(3, 64, 64, dtype=torch.uint8)
    edge[:, top:, 32:] = 255
    worst = 0.0
    for sigma in np.linspace(0.1, 2.0, 39):
        steps = [(5, "blur", float(sigma))]
        device = transforms.to_unit(edge[None], transforms.pack_steps([steps]))[0] * 255
        worst = max(worst, (device - transforms.augment(edge, steps)).abs().max().item())
    assert worst == pytest.approx(expected, abs=1)


def test_no_steps_leave_a_view_as_it_is():
    crop = views(encoded(), 0, lambda crop, _: crop)[0]
    assert transforms.augment(crop, []) is crop
    flipped = transforms.augment(crop, [(6, "flip", 0.0)])
    assert torch.equal(flipped, crop.flip(-1))


def test_evaluation_view_and_normalisation_equal_torchvisions():
    pixels = transforms.to_unit(transforms.CenterCrop(32, 36)(PICTURE)[None])
    ours = transforms.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)[0]
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
    assert decoding.decode_image(encoded(format, mode), "x").mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"not an image", encoded()[:-200], encoded("PNG")[:300]])
def test_an_image_that_cannot_be_read_is_named(data):
    with pytest.raises(InputError, match=r"image a/b\.jpg (cannot be read|is empty, or no image)"):
        decoding.decode_image(data, "a/b.jpg")
    with pytest.raises(InputError, match=r"image a/b\.jpg (cannot be read|is empty, or no image)"):
        transforms.EncodedImage(data, "a/b.jpg").crops([(0, 0, 4, 4)], 8)
