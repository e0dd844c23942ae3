"""From the bytes of an image file to RGB pixels, in one way for training and evaluation.

A picture is upright, transparent parts show white, and more than 8 bits a channel are scaled to 8.
The archived way, for sets that were read so, is Pillow's convert("RGB") alone: it leaves
photographs on their side, shows the colour below transparent parts and cuts 16 bits off.
"""

import io
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import InputError

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright, 5 to 8 lie on their side
PNG = b"\x89PNG\r\n\x1a\n"


@contextmanager
def reading(name):
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f"image {name} is empty, or no image; replace or remove it") from error
    except Exception as error:  # decoders of many formats raise of many kinds
        raise InputError(f"image {name} cannot be read: {error}; replace or remove it") from error


def open_image(data):
    """Encoded bytes -> a PIL image, of which only the header is read."""
    return Image.open(io.BytesIO(without_texts(data) if data.startswith(PNG) else data))


def without_texts(data):
    """A PNG without its texts and colour profile, whose length alone makes Pillow refuse it.

    Short plain ones of iTXt stay, as one of them may tell which side is up.
    """
    kept, start, at = [], 0, len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        is_long = end - at > 2**16 or data[at + 8 : end].partition(b"\0")[2][:1] != b"\0"
        if kind in (b"tEXt", b"zTXt", b"iCCP") or (kind == b"iTXt" and is_long):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def orientation_of(image):
    """EXIF's, 1 to 8. That of a PNG is known once its pixels are loaded."""
    try:
        number = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1
    return number if number in range(1, 9) else 1


def scale_to_8_bits(image):
    """A picture of one channel of 16 or 32 bits as one of 8. Raises ValueError if its range is
    unknown: integers of 32 bits above 255, and fractions beyond both 0 to 1 and 0 to 255."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of TIFF: 12 for some cameras
        top = 2.0**bits - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        top = 65535.0
    else:
        top = 1.0 if image.mode == "F" and high <= 1 else 255.0
    if not 0 <= low <= high <= top:
        raise ValueError(f"its values run from {low:g} to {high:g}; convert it to 8 bits")
    scaled = Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))
    clear = image.info.get("transparency")  # of PNG: the value that is transparent
    if clear is not None:
        scaled.putalpha(Image.fromarray((values != clear).astype(np.uint8) * 255))
    return scaled


def to_rgb(image, archived=False):
    """A PIL image as RGB; of an image that is RGB and upright already, itself.

    Raises ValueError for a picture whose range of values is unknown.
    """
    image.load()
    if archived:
        return image if image.mode == "RGB" else image.convert("RGB")
    orientation = orientation_of(image)
    if image.mode.startswith(("I", "F")):
        image = scale_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.transpose(TURNS[orientation]) if orientation > 1 else image


TURNS = {  # as ImageOps.exif_transpose does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data, name, archived=False):
    """Encoded bytes -> an RGB PIL image. Raises InputError, naming the file, if that fails.

    archived: bool, whether the pixels are those of the archived code.
    """
    with reading(name):
        return to_rgb(open_image(data), archived)


def read_size(image, archived=False):
    """(width, height) of the upright picture; loads all but JPEGs, whose size a header tells."""
    if image.format != "JPEG":
        image.load()
    is_on_its_side = not archived and orientation_of(image) > 4
    return image.size[::-1] if is_on_its_side else image.size
