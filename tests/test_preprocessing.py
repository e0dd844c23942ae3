"""Each consumer takes a model's own preprocessing: the pixels and tokens that reach its towers."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import train_flags, write_folders
from PIL import Image
from timm.models import VisionTransformer
from torch import nn
from torchvision.transforms import functional as TF

import eval_retrieval
import eval_zeroshot
import main
import main_finetune
import main_linear
import models
import tokenizer
import towers
import transforms
from preprocessing import CHOICES, CLIP_PREPROCESSING, SLIP_PREPROCESSING, Preprocessing
from pretrained import load_model
from utils import InputError

KINDS = {
    "slip": SLIP_PREPROCESSING,
    "clip": CLIP_PREPROCESSING,
    "own": Preprocessing(
        40, (0.5, 0.4, 0.3), (0.25, 0.3, 0.35), "bicubic", 0.7, "gelu", "argmax", "clip", 20
    ),
}
LONG = " ".join(["word"] * 40)
PROMPTS = range(4, 9)  # tokens of the prompts for digits


@pytest.fixture(params=KINDS)
def form(request, monkeypatch):
    """A kind of preprocessing, which the tower KIND of the test has."""
    row = replace(towers.TOWERS["NANO8"], preprocessing=KINDS[request.param])
    monkeypatch.setitem(towers.TOWERS, "KIND", row)
    return KINDS[request.param]


class Seen:
    """Records the inputs of all ViTs and token embeddings, and the crops that are drawn."""

    def __init__(self, monkeypatch):
        self.images, self.lengths, self.crops, self.scales = [], [], [], []
        crop, draw = transforms.crop, transforms.draw_crop

        def watched_crop(image, box, size, interpolation="bilinear"):
            self.crops.append((size, interpolation))
            return crop(image, box, size, interpolation)

        def watched_draw(rng, width, height, scale):
            self.scales.append(scale)
            return draw(rng, width, height, scale)

        monkeypatch.setattr(transforms, "crop", watched_crop)
        monkeypatch.setattr(transforms, "draw_crop", watched_draw)

    def record(self, module, inputs):
        if isinstance(module, VisionTransformer):
            self.images.append(inputs[0].detach())
        if isinstance(module, nn.Embedding) and module.num_embeddings == towers.VOCAB_SIZE:
            self.lengths.append(inputs[0].shape[1])

    @contextmanager
    def during(self):
        for records in (self.images, self.lengths, self.crops, self.scales):
            records.clear()
        hook = nn.modules.module.register_module_forward_pre_hook(self.record)
        yield
        hook.remove()
        assert self.images

    def pixels(self, form):
        """The images as bytes; they are whole numbers only by the right mean and deviation."""
        whole = set()
        for batch in self.images:
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (form.mean, form.std))
            pixels = (batch * std + mean) * 255
            if not pixels.any():  # a warm-up
                continue
            assert torch.allclose(pixels, pixels.round(), atol=1e-2)
            whole |= {image.round().byte().numpy().tobytes() for image in pixels}
        return whole


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


def central(path, size, resize, interpolation):
    """The evaluation view, by torchvision and PIL alone."""
    mode = TF.InterpolationMode(interpolation)
    image = TF.resize(Image.open(path).convert("RGB"), resize, mode)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size])).numpy().tobytes()


def run(script, text):
    script.main(script.get_args_parser().parse_args(text.split()))


def test_every_consumer_takes_the_models_own(form, seen, tiny, tmp_path):
    size = form.image_size or 32
    write_folders(tmp_path / "digits/train", each=2)
    write_folders(tmp_path / "digits/test", each=2)
    files = {split: [*(tmp_path / "digits" / split).rglob("*.png")] for split in ("train", "test")}
    catalog, checkpoint = tmp_path / "catalog.json", tmp_path / "run/checkpoint.pt"
    catalog.write_text(json.dumps({"digits": {"path": "digits", "type": "imagefolder"}}))
    common = f"--catalog {catalog} --workers 0 --device cpu --output-dir {tmp_path}"

    def views(split, resize, interpolation=form.interpolation):
        return {central(path, size, resize, interpolation) for path in files[split]}

    rows = json.loads((tiny / "captions.json").read_text())["annotations"]
    rows = [row | {"caption": LONG} for row in rows]
    (tmp_path / "long.json").write_text(json.dumps({"annotations": rows}))
    longest = min(form.context_length, 48)  # tokens, cut to one of few lengths
    with seen.during():
        extra = "--catalog", catalog, "--metadata", tmp_path / "long.json"
        flags = train_flags(tiny, tmp_path / "run", *extra, model="SLIP_KIND")
        main.main(main.get_args_parser().parse_args(flags))
    assert longest in seen.lengths and set(seen.lengths) <= {longest, *PROMPTS}
    assert views("test", size) <= seen.pixels(form)
    assert set(seen.crops) == {(size, form.interpolation)}
    assert set(seen.scales) == {(form.crop_min, 1.0), (0.08, 1.0)}

    model, _ = load_model(checkpoint)
    assert model.preprocessing == replace(form, image_size=size)
    gelu = type(model.transformer.resblocks[0].mlp.gelu)
    assert gelu is towers.ACTIVATIONS[form.activation]
    assert model.tokenizer(LONG).shape == (form.context_length,)

    with seen.during():
        (tmp_path / "prompts.json").write_text(json.dumps({"digits": [LONG + " {}"]}))
        flags = f"--datasets digits --templates {tmp_path}/prompts.json"
        run(eval_zeroshot, f"--resume {checkpoint} {common} {flags}")
    assert seen.pixels(form) == views("test", size)
    assert set(seen.lengths) == {min(form.context_length, 43)}  # start, 40 words, class, end

    captions = [{"image_id": 0, "caption": LONG}, {"image_id": 1, "caption": "short"}]
    images = [{"id": i, "file_name": path.name} for i, path in enumerate(files["test"][:2])]
    root = files["test"][0].parent
    text = json.dumps({"images": images, "annotations": captions})
    (tmp_path / "captions.json").write_text(text)
    with seen.during():
        flags = f"--captions {tmp_path}/captions.json --root {root} --output-dir {tmp_path}"
        run(eval_retrieval, f"--resume {checkpoint} {flags} --workers 0 --device cpu")
    assert seen.pixels(form) <= views("test", size) and len(seen.pixels(form)) == 2
    assert max(seen.lengths) == longest

    with seen.during():
        run(main_linear, f"--pretrained {checkpoint} {common} --dataset digits --classifier knn")
    assert seen.pixels(form) == views("train", size) | views("test", size)

    with seen.during():
        flags = f"{common} --dataset digits --epochs 1 --batch-size 4"
        run(main_linear, f"--pretrained {checkpoint} {flags}")
    assert views("test", round(size * 256 / 224)) <= seen.pixels(form)
    assert set(seen.crops) == {(size, form.interpolation)}

    with seen.during():
        flags += " --preset small --aa none --color-jitter 0 --mixup 0 --cutmix 0 --reprob 0"
        run(main_finetune, f"--pretrained {checkpoint} {flags} --warmup-epochs 0")
    resize = main_finetune.resized_side(size)
    assert views("test", resize, "bicubic") <= seen.pixels(form)


def test_registries_hold_the_choices():
    found = {"interpolation": transforms.INTERPOLATIONS, "activation": towers.ACTIVATIONS}
    found |= {"pooling": towers.POOLINGS, "tokenizer": tokenizer.TOKENIZERS}
    assert {name: set(table) for name, table in found.items()} == {
        name: set(choices) for name, choices in CHOICES.items()
    }


def test_a_form_survives_its_checkpoint():
    for form in KINDS.values():
        assert Preprocessing.from_dict(json.loads(json.dumps(form.to_dict()))) == form


@pytest.mark.parametrize(
    "field, value",
    [
        ("mean", (0.5, 0.5)),
        ("mean", "x"),
        ("mean", (0.5, 0.5, float("nan"))),
        ("std", (0.5, 0.5, 0)),
        ("std", (0.5, 0.5, 10**400)),
        ("interpolation", "lanczos"),
        ("interpolation", ["bilinear"]),
        ("crop_min", 1.5),
        ("activation", "relu"),
        ("tokenizer", "bert"),
        ("image_size", 10**9),
        ("image_size", True),
        ("context_length", 0),
        ("context_length", None),
        ("other", 1),
    ],
)
def test_a_hostile_form_is_refused(field, value):
    with pytest.raises(InputError) as error:
        Preprocessing.from_dict(SLIP_PREPROCESSING.to_dict() | {field: value})
    assert len(str(error.value)) < 200


def test_models_are_listed():
    names = models.list_models()
    assert {"SLIP_VITB16", "CLIP_ViT-B-32", "SLIP_ViT-L-14", "SIMCLR_RN50x4"} <= set(names)
    assert {f"CLIP_{tower}" for tower in towers.TOWERS} <= set(names)


@pytest.mark.parametrize("name", ["ViT-B-32", "SLIP_VITB16", "CLIP_RN50-quickgelu"])
def test_a_tokenizer_is_found_by_the_models_name(name):
    tokens = tokenizer.get_tokenizer(name)(["a dog", LONG])
    assert torch.equal(tokens, tokenizer.SimpleTokenizer()(["a dog", LONG]))


def test_an_unknown_tokenizer_lists_the_choices():
    with pytest.raises(
        InputError, match="unknown tower 'ViT-Z-99'; choose from VITS16, .*ViT-B-32"
    ):
        tokenizer.get_tokenizer("ViT-Z-99")
