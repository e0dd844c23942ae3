"""Folders for other tools, opened by these tools."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from test_layouts import assert_close, assert_same, embed, embed_ours, on_meta, random_weights

import export
import formats
import tokenizer
from models import METHODS
from preprocessing import CLIP_PREPROCESSING, Preprocessing
from pretrained import load_model
from towers import CLIP_TOWERS, TOWERS, Tower
from transforms import CenterCrop
from utils import InputError

SMALL_TEXT = {"embed_dim": 32, "text_width": 64, "text_heads": 1, "text_layers": 1}
SMALL_VIT = {"img_size": 64, "embed_dim": 128, "depth": 2, "num_heads": 2}
ROWS = {
    "vits": replace(TOWERS["VITS16"], options={"num_heads": 12, "depth": 2}, **SMALL_TEXT),
    "clip": Tower("vit_base_patch32_clip_224", SMALL_VIT, **SMALL_TEXT),
    "timm": Tower("test_convnext", **SMALL_TEXT),
    "resized": Tower("test_vit", **SMALL_TEXT, preprocessing=Preprocessing(image_size=64)),
    "mobilenet": Tower("mobilenetv3_small_050", **SMALL_TEXT),
}
GELU = replace(CLIP_PREPROCESSING, image_size=64)
ROWS["clip gelu"] = replace(ROWS["clip"], preprocessing=GELU)
QUICK = {"act_layer": "quick_gelu"}
ROWS["clip quick"] = replace(ROWS["clip"], options=SMALL_VIT | QUICK)


@pytest.fixture
def towers(monkeypatch):
    """The rows, under names that checkpoints may hold."""
    for name, row in ROWS.items():
        monkeypatch.setitem(TOWERS, name, row)


def source_of(name, row=None):
    """A model with random weights, as a writer takes it."""
    method, _, tower = name.partition("_")
    row = row or ROWS[tower]
    model = METHODS[method](row, 8, 8).eval()
    model.load_state_dict(random_weights(model.state_dict()))
    return formats.Source(model, name, row)


# ---------------------------------------------------------------------------------------------
# open_clip


def open_by_open_clip(folder):
    """(model, its evaluation transform, its tokenizer)."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


OPEN_CLIP = {  # how open_clip builds the image tower
    "SLIP_vits": "local-dir",
    "CLIP_resized": "local-dir",
    "CLIP_clip": "local-dir",  # a ViT with GELU beside a text tower with QuickGELU
    "SLIP_timm": "test_convnext",
    "CLIP_clip gelu": None,
    "CLIP_clip quick": None,
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_opens_an_export(name, towers, tmp_path):
    source = source_of(name)
    notes = formats.write_open_clip(source, tmp_path, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    trunk = config["model_cfg"]["vision_cfg"].get("timm_model_name")
    assert trunk == (f"local-dir:{tmp_path}" if OPEN_CLIP[name] == "local-dir" else OPEN_CLIP[name])
    assert bool(notes) == (OPEN_CLIP[name] == "local-dir")

    peer, _, tokens = open_by_open_clip(tmp_path)
    model = source.model
    theirs = embed(peer.encode_image, peer.encode_text, model.image_size)
    assert_close(embed_ours(model), theirs)
    assert torch.equal(tokens(["a photo of fog"]), model.tokenizer(["a photo of fog"]))

    # And back: a CLIP model of ours, bit for bit.
    back, args = load_model(tmp_path)
    assert args.model == f"CLIP_{name.partition('_')[2]}"
    assert back.preprocessing == model.preprocessing
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("image_mlp.")}
    assert_same(back.state_dict(), kept)


@pytest.mark.parametrize("name", [*CLIP_TOWERS, "ViT-B-32-quickgelu"])
def test_configurations_of_open_clips_towers_are_its_own(name, tmp_path, monkeypatch):
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    monkeypatch.setattr(formats, "save_tensors", lambda path, tensors: None)
    source = formats.Source(on_meta(f"CLIP_{name}"), f"CLIP_{name}", TOWERS[name])
    assert formats.write_open_clip(source, tmp_path, tmp_path) == []
    ours = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    theirs = open_clip.get_model_config(name)
    for config in (ours, theirs):
        config["vision_cfg"] = {k: v for k, v in config["vision_cfg"].items() if v is not None}
        config["vision_cfg"] = CLIPVisionCfg(**config["vision_cfg"])
        config["text_cfg"] = CLIPTextCfg(**config["text_cfg"])
    assert {"quick_gelu": False} | ours == {"quick_gelu": False} | theirs


def test_a_tower_that_open_clip_builds_otherwise_is_refused(tmp_path):
    with pytest.raises(InputError, match="open_clip would build mobilenetv3_small_050 otherwise"):
        formats.write_open_clip(source_of("CLIP_mobilenet"), tmp_path, tmp_path)


# ---------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("name", ["SLIP_vits", "SIMCLR_resized", "CLIP_timm", "CLIP_clip quick"])
def test_timm_opens_an_export(name, tmp_path):
    import timm

    source = source_of(name)
    formats.write_timm(source, tmp_path, tmp_path)
    model, size = source.model, source.model.image_size
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(peer(x), model.visual(x))


@pytest.mark.parametrize("size", [None, 288])
def test_timm_builds_clips_resnets(size, tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(formats, "save_tensors", lambda path, tensors: None)
    row = TOWERS["RN50"]
    row = replace(row, preprocessing=replace(row.preprocessing, image_size=size), **SMALL_TEXT)
    with torch.device("meta"):
        model = METHODS["CLIP"](row)
        formats.write_timm(formats.Source(model, "CLIP_RN50", row), tmp_path, tmp_path)
        peer = timm.create_model(f"local-dir:{tmp_path}")
    shapes = {key: value.shape for key, value in model.visual.state_dict().items()}
    assert shapes == {key: value.shape for key, value in peer.state_dict().items()}


def test_a_full_disk_under_safetensors_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(InputError, match="No space left on device .*; free space, or choose"):
        formats.write_timm(source_of("SIMCLR_vits"), tmp_path, tmp_path)


# ---------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize("name", ["CLIP_clip", "SLIP_clip quick", "CLIP_clip gelu"])
def test_transformers_opens_an_export(name, tmp_path):
    from transformers import CLIPModel

    source = source_of(name)
    formats.write_huggingface(source, tmp_path, tmp_path)
    peer, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    theirs = embed(
        lambda images: peer.eval().get_image_features(images).pooler_output,
        lambda texts: peer.get_text_features(texts).pooler_output,
        64,
    )
    assert_close(embed_ours(source.model), theirs)
    assert torch.equal(peer.logit_scale, source.model.logit_scale)


TEXTS = [
    "A photo of a dog!",
    "!!! 100% <|endoftext|> it's, they'll -- don't",
    "  two   blanks\n\tand a TAB ",
    "漢字 и кириллица, Ünïcödé, emoji 🐕‍🦺 and ½",
    "x" * 300,
    "",
    "word " * 100,
]


def test_the_tokenizer_of_transformers_gives_our_ids(tmp_path):
    from transformers import AutoTokenizer, CLIPProcessor

    source = source_of("CLIP_clip")
    formats.write_huggingface(source, tmp_path, tmp_path)
    ours = source.model.tokenizer
    for theirs in (
        CLIPProcessor.from_pretrained(tmp_path).tokenizer,
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        for text in TEXTS:
            ids = theirs(tokenizer.clean(text), truncation=True)["input_ids"]
            expected = ours(text)
            assert ids == expected[: len(ids)].tolist() and not expected[len(ids) :].any(), text
        assert theirs.model_max_length == 77 and len(theirs) == 49408


@pytest.mark.parametrize(
    "name, part",
    [
        ("SLIP_vits", "a patch bias and no norm_pre"),
        ("CLIP_timm", "timm's ConvNeXt, no ViT"),
        ("CLIP_RN50", "an attention-pooled ResNet"),
        ("CLIP_vit_small_patch16_18x2_224", "a patch bias and no norm_pre and entries .* unknown"),
        ("CLIP_vit_medium_patch16_gap_240", "a patch bias and no .* and pooling by 'avg' and entr"),
    ],
)
def test_towers_that_transformers_has_not_are_refused(name, part, towers, tmp_path):
    source = formats.Source(on_meta(name), name, None)
    with pytest.raises(InputError, match=f"{name} has {part}.*CLIPModel cannot express; choose"):
        formats.write_huggingface(source, tmp_path, tmp_path)


# ---------------------------------------------------------------------------------------------
# Preprocessing


def open_transform(kind, folder):
    """An image -> (3, S, S), as the tool prepares it."""
    if kind == "open_clip":
        return open_by_open_clip(folder)[1]
    if kind == "timm":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder)
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("name", ["CLIP_clip", "CLIP_clip gelu"])
@pytest.mark.parametrize("kind", ["open_clip", "timm", "huggingface"])
def test_images_are_prepared_as_ours_are(kind, name, tmp_path):
    source = source_of(name)
    export.FORMATS[kind].write(source, tmp_path, tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (100, 160, 3), dtype=np.uint8)
    image = Image.fromarray(noise)  # on which the interpolations differ
    pixels = torch.as_tensor(CenterCrop.of(source.form)(image))
    expected = source.model.normalize(pixels[None])[0]
    theirs = open_transform(kind, tmp_path)(image)
    assert (theirs - expected).abs().max() <= 2.01 / 255 / min(source.form.std)
    assert (theirs - expected).abs().mean() < 0.25 / 255 / min(source.form.std)
