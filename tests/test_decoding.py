"""Pixels are the same in training and evaluation: upright, on white, 8 bits a channel."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import decoding
from catalog import get_downstream_dataset, load_catalog, unchanged
from datasets import CaptionDataset
from eval_retrieval import Images
from preprocessing import Preprocessing
from torchvision_sets import Labelled
from transforms import CenterCrop, EncodedImage
from utils import InputError

SHADES = np.arange(256, dtype=np.uint8).reshape(16, 16)
# A picture whose quarters differ, so that a turn shows; of JPEG's blocks.
QUARTERS = np.zeros((32, 48, 3), np.uint8)
QUARTERS[:16, :24], QUARTERS[:16, 24:], QUARTERS[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(data, **options):
    return np.asarray(decoding.decode_image(data, "x", **options))


def exif(orientation):
    tags = Image.Exif()
    tags[decoding.ORIENTATION] = orientation
    return tags


DEEP = {  # the 256 shades at more bits: they must come back as they are
    "16-bit PNG": (SHADES.astype(np.uint16) * 257, "PNG"),
    "16-bit TIFF": (SHADES.astype(np.uint16) * 257, "TIFF"),
    "16-bit JPEG 2000": (SHADES.astype(np.uint16) * 257, "JPEG2000"),
    "16-bit PGM": (SHADES.astype(np.int32) * 257, "PPM"),
    "float TIFF to 1": ((SHADES / 255).astype(np.float32), "TIFF"),
    "float TIFF to 255": (SHADES.astype(np.float32), "TIFF"),
    "32-bit TIFF to 255": (SHADES.astype(np.int32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled(name):
    values, form = DEEP[name]
    data = encode(Image.fromarray(values), form)
    assert (pixels(data) == SHADES[..., None]).all()
    (crop,) = EncodedImage(data, "x").crops([(0, 0, 16, 16)], 16)
    assert torch.equal(crop, torch.from_numpy(SHADES).expand(3, -1, -1))


def test_the_transparent_value_of_16_bits_is_white():
    values = np.full((8, 8), 40000, np.uint16)
    values[0] = 5
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=5)
    pixels = np.array(decoding.decode_image(file.getvalue(), "x"))
    assert (pixels[0] == 255).all() and (pixels[1:] == 156).all()


def test_12_bits_of_a_tiff_are_scaled():
    data = bytearray(encode(Image.fromarray(SHADES.astype(np.uint16) * 257), "TIFF"))
    image = Image.open(io.BytesIO(data))
    image.load()
    image.tag_v2[258] = (12,)
    image.putdata((SHADES.astype(int).ravel() * 4095 / 255).round().astype(int).tolist())
    assert (np.asarray(decoding.scale_to_8_bits(image)) == SHADES).all()


@pytest.mark.parametrize(
    "values",
    [
        SHADES.astype(np.int32) * 70_000,
        SHADES.astype(np.int32) - 5,
        SHADES.astype(np.float32) * 40,
        SHADES.astype(np.float32) - 5,
        SHADES.astype(np.float32) * np.nan,
    ],
)
def test_values_of_unknown_range_are_named(values):
    data = encode(Image.fromarray(values), "TIFF")
    message = "^image x cannot be read: its values run from .* convert it to 8 bits; replace or re"
    with pytest.raises(InputError, match=message):
        decoding.decode_image(data, "x")
    with pytest.raises(InputError, match=message):
        EncodedImage(data, "x").crops([(0, 0, 8, 8)], 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    """Half transparent parts lie half way to white."""
    color = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    color.paste((100, 100, 100, 255), (4, 0, 8, 4))
    color.paste((100, 100, 100, 128), (0, 4, 4, 8))
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.paste(1, (4, 0, 8, 4))
        data = encode(image, "PNG", transparency=0)
    else:
        data = encode(color.convert(mode), "PNG")
    shown = pixels(data)
    assert (shown[0, 0] == 255).all() and (shown[0, 7] == 100).all()
    if mode != "P":
        assert abs(shown[7, 0].astype(int) - 177).max() <= 1
    assert (pixels(data, archived=True)[0, 0] == 0).all()  # black corners


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_by_exif(form, orientation):
    turned = Image.fromarray(QUARTERS)
    data = encode(
        turned, form, exif=exif(orientation), **({} if form == "TIFF" else {"quality": 95})
    )
    expected = {
        1: QUARTERS, 2: QUARTERS[:, ::-1], 3: QUARTERS[::-1, ::-1], 4: QUARTERS[::-1],
        5: QUARTERS.swapaxes(0, 1), 6: np.rot90(QUARTERS, -1),
        7: QUARTERS[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(QUARTERS),
    }[orientation]  # fmt: skip
    shown = pixels(data)
    assert shown.shape == expected.shape
    assert abs(shown.astype(int) - expected)[4:12, 4:12].max() < 40  # within one quarter
    image = EncodedImage(data, "x")
    assert image.size == expected.shape[1::-1]
    height, width = expected.shape[:2]
    for shrunken in (False, True):
        side = 4 if shrunken else 24
        (crop,) = EncodedImage(data, "x").crops([(0, 0, height, width)], side)
        for row in (0, -1):
            for column in (0, -1):
                corner = crop[:, row, column].int() - torch.tensor(expected[row, column].tolist())
                assert corner.abs().max() < 60
    if form != "TIFF":  # Pillow itself turns these
        assert pixels(data, archived=True).shape == QUARTERS.shape
        assert EncodedImage(data, "x", archived=True).size == (48, 32)


@pytest.mark.parametrize("tags", [b"Exif\0\0" + bytes(20), b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"])
def test_damaged_exif_loses_no_picture(tags):
    data = encode(Image.fromarray(QUARTERS), "JPEG", exif=tags)
    assert pixels(data).shape == QUARTERS.shape


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_is_none_is_upright(orientation):
    image = Image.fromarray(QUARTERS)
    image.info["exif"] = exif(orientation).tobytes()
    assert decoding.orientation_of(image) == 1


def test_a_png_with_long_texts_is_read():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "x" * 2**21, zip=True)
    texts.add_itxt("b", "y" * 2**21, zip=True)
    texts.add_itxt("c", "z" * 2**21)
    texts.add_text("d", "w" * 2**21)
    image = Image.fromarray(QUARTERS)
    data = encode(image, "PNG", pnginfo=texts, icc_profile=np.random.default_rng(0).bytes(2**21))
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):  # Pillow alone
        Image.open(io.BytesIO(data)).load()
    assert (pixels(data) == QUARTERS).all()
    # Those after the pixels as well.
    chunk = b"zTXtk\0\0" + zlib.compress(bytes(2**22))
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    plain = encode(image, "PNG")
    assert (pixels(plain[:-12] + chunk + plain[-12:]) == QUARTERS).all()
    assert decoding.without_texts(plain) is plain


# --- all readers agree --------------------------------------------------------------------------

ODD = {
    "1.png": Image.fromarray(SHADES.astype(np.uint16) * 257).resize((32, 32)),
    "2.png": Image.new("RGBA", (32, 32), (0, 0, 0, 0)),
    "3.jpg": Image.fromarray(QUARTERS),
}


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_every_reader_shows_the_same_pixels(tmp_path, name, archived):
    root = tmp_path / "set"
    (root / "val/a").mkdir(parents=True)
    options = {"exif": exif(6)} if name.endswith("jpg") else {}
    for path in (root / name, root / "val/a" / name):
        ODD[name].save(path, **options)
    np.save(root / "val_images.npy", np.array([name]))
    np.save(root / "val_labels.npy", np.array([0]))
    expected = decoding.decode_image((root / name).read_bytes(), "x", archived)

    pick = {"test": "val", "path": str(root), "pixels": "archived" if archived else "upright"}
    entries = {kind: {"type": kind, **pick} for kind in ("imagefolder", "filelist")}
    (tmp_path / "catalog.json").write_text(json.dumps(entries))
    sets = load_catalog(tmp_path / "catalog.json")
    shown = [get_downstream_dataset(sets, kind, False, unchanged, ["a"])[0][0] for kind in entries]
    own = Labelled("mnist", [(Image.open(root / name), 0)], [0], unchanged, archived)
    shown.append(own[0][0])
    assert all(np.array_equal(image, expected) for image in shown)

    side = 32
    crop = Images(root, [name], CenterCrop(side), archived=archived)[0][0]
    view = CaptionDataset(
        [(name, ["x"])], root, ["image"], Preprocessing(image_size=side), archived=archived
    )
    size = EncodedImage((root / name).read_bytes(), "x", archived).size
    assert size == expected.size and view[0, [0]]["image"].shape == crop.shape == (3, side, side)
    whole = EncodedImage((root / name).read_bytes(), "x", archived)
    (whole,) = whole.crops([(0, 0, *size[::-1])], 32)
    direct = np.asarray(expected.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert abs(whole.permute(1, 2, 0).numpy().astype(int) - direct).max() <= 1
