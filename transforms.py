"""Image views: what a picture becomes before a model sees it.

A view draws its parameters from the generator it is given, so a sample depends on that alone, then
applies PIL operations. Views return uint8 (3, S, S); `to_float` normalises a batch on its device.
The parameters' distributions are torchvision's and the paper's (arXiv:2112.12750, section 4).
"""

import io
import math
from functools import lru_cache

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

from utils import InputError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per channel
STD = (0.229, 0.224, 0.225)


def decode_image(data, name):
    """Encoded bytes -> an RGB PIL image. Raises InputError, naming the file, if that fails."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # decoders of many formats raise of many kinds
        raise InputError(f"image {name} cannot be read: {error}; replace or remove it") from error


def to_uint8(image):
    """A PIL image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@lru_cache
def mean_and_std(device):
    """(3, 1, 1) each; made once a device, since making them waits for a GPU."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


def to_float(images):
    """(B, 3, S, S) uint8 -> float32, normalised by ImageNet's mean and deviation."""
    mean, std = mean_and_std(images.device)
    return (images.float() / 255 - mean) / std


def draw_crop(rng, width, height, scale):
    """A box (top, left, height, width) of `scale` of the area and aspect ratio 3/4 to 4/3.

    As RandomResizedCrop: ten tries, then the largest central box within the aspect ratios.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (height - h) // 2, (width - w) // 2, h, w


class RandomCrop:
    """The image view of CLIP and SLIP: a random crop of most of the picture, resized."""

    def __init__(self, size, scale=(0.5, 1.0)):
        self.size, self.scale = size, scale

    def __call__(self, image, rng):
        box = draw_crop(rng, *image.size, self.scale)
        return to_uint8(TF.resized_crop(image, *box, [self.size, self.size]))


JITTER = {  # ColorJitter(0.4, 0.4, 0.4, 0.1): the operation and the range of its factor
    "brightness": (TF.adjust_brightness, (0.6, 1.4)),
    "contrast": (TF.adjust_contrast, (0.6, 1.4)),
    "saturation": (TF.adjust_saturation, (0.6, 1.4)),
    "hue": (TF.adjust_hue, (-0.1, 0.1)),
}


def draw_augmentation(rng):
    """The parameters of SimCLR's colour and blur augmentation after MoCo v3; None: left out."""
    order = [str(name) for name in rng.permutation(list(JITTER))]
    jitter = {name: rng.uniform(*JITTER[name][1]) for name in order}
    return {
        "jitter": jitter if rng.random() < 0.8 else None,  # applied in this dict's order
        "grayscale": rng.random() < 0.2,
        "blur": rng.uniform(0.1, 2.0) if rng.random() < 0.5 else None,  # radius in pixels
        "flip": rng.random() < 0.5,
    }


def augment(image, jitter, grayscale, blur, flip):
    """Applies drawn parameters to a PIL image."""
    for name, factor in (jitter or {}).items():
        image = JITTER[name][0](image, factor)
    if grayscale:
        image = TF.to_grayscale(image, num_output_channels=3)
    if blur is not None:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return TF.hflip(image) if flip else image


class RandomAugment:
    """The self-supervised view of SimCLR and SLIP."""

    def __init__(self, size, scale=(0.08, 1.0)):
        self.size, self.scale = size, scale

    def __call__(self, image, rng):
        box = draw_crop(rng, *image.size, self.scale)
        image = TF.resized_crop(image, *box, [self.size, self.size])
        return to_uint8(augment(image, **draw_augmentation(rng)))


class CenterCrop:
    """The evaluation view: the shorter side resized to `resize`, then the central square."""

    def __init__(self, size, resize=None):
        self.size, self.resize = size, resize or size

    def __call__(self, image):
        return to_uint8(TF.center_crop(TF.resize(image, self.resize), [self.size, self.size]))


# The views a method may name (models.CLIP.views); "text" is the caption.
IMAGE_VIEWS = {"image": RandomCrop, "aug1": RandomAugment, "aug2": RandomAugment}
