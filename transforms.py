"""Image views: crops and augmentations that turn a picture into the input of a model.

A view draws all it needs from the generator it is given, so a sample depends on that alone: a crop,
and for SimCLR the steps of its colour and blur augmentation. The picture is then decoded once and
cropped to uint8. The steps are applied by PIL in the loader's workers, or in batches on the device.
The parameters' distributions are torchvision's and the paper's (arXiv:2112.12750, section 4).
Shapes: B batch, S side of a view.
"""

import io
import math
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import nn

from decoding import open_image, read_size, reading, to_rgb

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic")}
LONGEST = 16  # times its shorter side is the longer one of a picture that is resized whole
DRAFT_MARGIN = 3  # a picture may be decoded smaller, if every crop keeps this many times its side


# ---------------------------------------------------------------------------------------------
# Decoding and cropping


def to_uint8(image):
    """A PIL image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def encode_jpeg(pixels, longest=96):
    """(3, H, W) uint8 -> the bytes of a JPEG of at most `longest` pixels a side."""
    image, file = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    image.thumbnail((longest, longest))
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def pixels_of(image):
    """A PIL image's own memory, uncopied: (4, H, W) uint8, the fourth channel without meaning."""
    try:
        pixels = pa.array(image).flatten()
    except ValueError:  # Pillow keeps a very large image in several blocks
        return to_uint8(image)
    return torch.from_dlpack(pixels).view(image.height, image.width, 4).permute(2, 0, 1)


class EncodedImage:
    """A picture of which `size`, (width, height), is known; decoded once its crops are.

    Raises InputError, naming the file, if it is damaged, truncated or no image.

    Args:
        data: the encoded bytes.
        name: of the file, for errors.
        archived: bool, whether the pixels are those of the archived code (decoding.py).
    """

    def __init__(self, data, name, archived=False):
        self.name, self.archived = name, archived
        with reading(name):
            self.image = open_image(data)
            self.size = read_size(self.image, archived)

    def decode(self, shrink):
        """A PIL image in RGB; of a JPEG, `shrink` 2, 4 or 8 decodes one that much smaller."""
        with reading(self.name):
            if shrink > 1:
                self.image.draft(None, [side // shrink for side in self.image.size])
            return to_rgb(self.image, self.archived)

    def crops(self, boxes, size, interpolation="bilinear"):
        """Each box (top, left, height, width), resized: a list of (3, S, S) uint8."""
        smallest = min(min(height, width) for _, _, height, width in boxes)
        wanted = (8, 4, 2) if self.image.format == "JPEG" else ()
        shrink = next((k for k in wanted if smallest >= k * DRAFT_MARGIN * size), 1)
        image = self.decode(shrink)
        if shrink > 1:
            boxes = [[x / shrink for x in box] for box in boxes]
            return [crop_between_pixels(image, box, size, interpolation) for box in boxes]
        return [crop(image, box, size, interpolation) for box in boxes]


def crop(image, box, size, interpolation="bilinear"):
    """A box of a PIL image -> (3, S, S) uint8: PIL's antialiased resize, bilinear to 1/255."""
    top, left, height, width = box
    if interpolation == "bilinear":  # PyTorch's is faster, but its bicubic is off by up to 7
        part = pixels_of(image)[None, :, top : top + height, left : left + width]
        return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0, :3]
    part = image.crop((left, top, left + width, top + height))
    return to_uint8(part.resize((size, size), INTERPOLATIONS[interpolation]))


def crop_between_pixels(image, box, size, interpolation):
    """As crop, of a PIL image and a box whose edges are fractions of a pixel."""
    top, left, height, width = box
    edges = left, top, min(left + width, image.width), min(top + height, image.height)
    return to_uint8(image.resize((size, size), INTERPOLATIONS[interpolation], edges))


# ---------------------------------------------------------------------------------------------
# Drawing


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


def draw_image(rng, width, height, crop_min=0.5):
    """The image view of CLIP and SLIP: a crop of `crop_min` to all of the area, without steps."""
    return draw_crop(rng, width, height, (crop_min, 1.0)), None


def draw_augmentation(rng, width, height, _=None):
    """The self-supervised view of SimCLR and SLIP, after MoCo v3: a crop and its steps.

    A step is (slot, operation, value), in the order of slots: colour jitter in slots 0 to 3, in
    random order, then grayscale, blur and flip.
    """
    box = draw_crop(rng, width, height, (0.08, 1.0))
    order = [str(name) for name in rng.permutation(list(JITTER))]
    steps = [(slot, name, rng.uniform(*JITTER[name])) for slot, name in enumerate(order)]
    if rng.random() >= 0.8:
        steps = []
    if rng.random() < 0.2:
        steps.append((4, "grayscale", 0.0))
    if rng.random() < 0.5:
        steps.append((5, "blur", rng.uniform(0.1, 2.0)))  # deviation in pixels
    if rng.random() < 0.5:
        steps.append((6, "flip", 0.0))
    return box, steps


# The views a method may name (models.CLIP.views); "text" is the caption.
IMAGE_VIEWS = {"image": draw_image, "aug1": draw_augmentation, "aug2": draw_augmentation}
JITTER = {  # ColorJitter(0.4, 0.4, 0.4, 0.1): the range of each operation's factor
    "brightness": (0.6, 1.4),
    "contrast": (0.6, 1.4),
    "saturation": (0.6, 1.4),
    "hue": (-0.1, 0.1),
}


# ---------------------------------------------------------------------------------------------
# The steps on the CPU, by PIL

PIL_STEPS = {  # (PIL image, value) -> PIL image
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grayscale": lambda image, _: TF.to_grayscale(image, num_output_channels=3),
    "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    "flip": lambda image, _: TF.hflip(image),
}


def augment(pixels, steps):
    """Applies the steps to (3, S, S) uint8 by PIL."""
    if not steps:
        return pixels
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    for _, name, value in steps:
        image = PIL_STEPS[name](image, value)
    return to_uint8(image)


# ---------------------------------------------------------------------------------------------
# The steps on the device: (B, 3, S, S) in [0, 1], a value a sample (B, 1, 1, 1)
#
# Each operation takes the whole batch, so that kernels are few and shapes do not depend on the
# draw. A sample that lacks a step has its neutral value, which leaves the pixels as they are.

BLENDS = {  # factor -> weights of the image, of its mean luminance, and of its luminance
    "brightness": lambda factor: (factor, 0, 0),
    "contrast": lambda factor: (factor, 1 - factor, 0),
    "saturation": lambda factor: (factor, 0, 1 - factor),
    "grayscale": lambda _: (0, 0, 1),
}
VALUES = {"hue": 0, "blur": 1, "flip": 2}  # column of the last row of packed steps


def pack_steps(drawn):
    """The steps of B samples -> (B, 8, 3) float32, a row for each of the device's operations.

    Rows 0 to 2 blend before the hue is turned, rows 3 to 6 after it: weights as in BLENDS. Row 7
    has the turn of the hue, the blur's deviation, and 1 for a flip.
    """
    packed = np.zeros((len(drawn), 8, 3), np.float32)
    packed[:, :7] = BLENDS["brightness"](1)  # neutral
    for rows, steps in zip(packed, drawn, strict=True):
        is_turned = False
        for slot, name, value in steps:
            if name in BLENDS:
                rows[slot + 2 * is_turned] = BLENDS[name](value)
            else:
                rows[7, VALUES[name]] = 1 if name == "flip" else value
            is_turned |= name == "hue"
    return torch.from_numpy(packed)


def blend(images, weights):
    """weights: (B, 3), of the image, of its mean luminance, and of its luminance."""
    own, mean, gray = weights.view(-1, 3, 1, 1, 1).unbind(1)
    red, green, blue = images.split(1, dim=1)
    luminance = (0.2989 * red).add(green, alpha=0.587).add(blue, alpha=0.114)  # ITU-R 601
    other = torch.addcmul(mean * luminance.mean((2, 3), keepdim=True), gray, luminance)
    return torch.addcmul(other, own, images).clamp_(0, 1)


def turn_hue(images, shift):
    """Turns the hue by `shift` of a full circle, in HSV."""
    red, green, blue = images.unbind(1)
    value, minimum = images.amax(1), images.amin(1)
    chroma = value - minimum
    span = chroma.clamp(min=1e-12)
    hue = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    # Channel n is the value, less the chroma times a trapezoid of the hue.
    channels = torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)
    ramp = (channels + (hue + 6 * shift[:, 0]).unsqueeze(1)).remainder(6)
    trapezoid = torch.minimum(ramp, 4 - ramp).clamp(0, 1)
    turned = value.unsqueeze(1) - chroma.unsqueeze(1) * trapezoid
    return torch.where(shift == 0, images, turned)


def blur(images, sigma):
    """Gaussian blur of deviation `sigma` pixels, mirrored at the edges, as two matrix products."""
    size = images.shape[-1]
    i = torch.arange(size, device=images.device, dtype=images.dtype)
    inner = (i > 0) & (i < size - 1)  # columns that have a mirror image beyond each edge
    there, here = i[None], i[:, None]
    deviation = sigma[:, 0].clamp(min=0.1)  # which blurs nothing
    weights = sum(
        torch.exp(-0.5 * (distance / deviation) ** 2) * is_there
        for distance, is_there in (
            (here - there, 1),
            (here + there, inner | (i == size - 1)),
            (here + there - 2 * (size - 1), inner | (i == 0)),
        )
    )
    weights = (weights / weights.sum(-1, keepdim=True))[:, None]  # (B, 1, S, S)
    return torch.where(sigma == 0, images, weights @ images @ weights.mT)


def augment_batch(images, steps):
    """Applies packed steps to (B, 3, S, S) in [0, 1]."""
    *blends, values = steps.unbind(1)
    shift, sigma, is_flipped = values.view(-1, 3, 1, 1, 1).unbind(1)
    for weights in blends[:3]:
        images = blend(images, weights)
    images = turn_hue(images, shift)
    for weights in blends[3:]:
        images = blend(images, weights)
    images = blur(images, sigma)
    return torch.where(is_flipped == 1, images.flip(-1), images)


@lru_cache
def per_channel(values, device):
    """(3, 1, 1); made once a device, since making it waits for a GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def to_unit(images, steps=None):
    """(B, 3, S, S) uint8 -> float32 in [0, 1]; applies packed steps (B, 8, 3), if there are any."""
    images = images.float() / 255
    return images if steps is None else augment_batch(images, steps)


class Augment(nn.Module):
    """to_unit with steps, as a module, so that it can be compiled."""

    def forward(self, images, steps):
        return to_unit(images, steps)


def normalize(images, mean, std):
    """(B, 3, S, S) in [0, 1] -> the images as a model takes them; mean, std: a number a channel."""
    return (images - per_channel(mean, images.device)) / per_channel(std, images.device)


# ---------------------------------------------------------------------------------------------
# Labelled images


class ToInput:
    """A PIL image -> a model's input, (3, S, S) float32, normalised.

    view: PIL image -> (3, S, S) uint8. form: the model's Preprocessing.
    """

    def __init__(self, view, form):
        self.view, self.form = view, form

    def __call__(self, image):
        unit = to_unit(self.view(to_rgb(image))[None])
        return normalize(unit, self.form.mean, self.form.std)[0]


class CropAndFlip:
    """The linear probe's training view: a crop of `least` to all of the area, half of them flipped.

    (PIL image, generator) -> (3, S, S) uint8; without a generator PyTorch's seeds one.
    """

    def __init__(self, size, least=0.08, flip=True, interpolation="bilinear"):
        self.size, self.least, self.flip, self.interpolation = size, least, flip, interpolation

    def __call__(self, image, rng=None):
        rng = rng or np.random.default_rng(int(torch.randint(2**62, ())))
        box = draw_crop(rng, *image.size, (self.least, 1.0))
        pixels = crop(image, box, self.size, self.interpolation)
        return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels


class CenterCrop:
    """The evaluation view: the shorter side resized to `resize`, then the central square."""

    def __init__(self, size, resize=None, interpolation="bilinear"):
        self.size, self.resize = size, resize or size
        self.interpolation = interpolation

    @classmethod
    def of(cls, preprocessing, resize=None):
        """The view for a model."""
        return cls(preprocessing.image_size, resize, preprocessing.interpolation)

    def __call__(self, image):
        if max(image.size) > LONGEST * min(image.size):
            return self.of_a_strip(image)
        image = TF.resize(image, self.resize, TF.InterpolationMode(self.interpolation))
        return to_uint8(TF.center_crop(image, [self.size, self.size]))

    def of_a_strip(self, image):
        """The same pixels of a very long picture, whose resized whole would take gigabytes."""
        short, length = min(image.size), max(image.size)
        resized = int(self.resize * length / short)
        start = round((resized - self.size) / 2)
        # Pillow sees only what is in the box, so its edges lie a filter's width from the view's.
        margin = min(math.ceil(3 * max(self.resize / short, 1)), start)
        part = self.size + 2 * margin
        first, last = (x * length / resized for x in (start - margin, start - margin + part))
        size, box = (part, self.resize), (first, 0, last, short)
        if image.height == length:
            size, box = size[::-1], (0, first, short, last)
        image = image.resize(size, INTERPOLATIONS[self.interpolation], box)
        left, top = (margin if side == part else round((side - self.size) / 2) for side in size)
        return to_uint8(image.crop((left, top, left + self.size, top + self.size)))
