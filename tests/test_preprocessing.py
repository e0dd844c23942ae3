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
from pretrained import get_tokenizer, load_model
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


class Stage:
    """A model of the kind, small sets on disk, and the views of them that its towers must see."""

    def __init__(self, form, folder):
        self.form, self.folder, self.size = form, folder, form.image_size or 32
        write_folders(folder / "digits/train", each=2)
        write_folders(folder / "digits/test", each=2)
        parts = ("train", "test")
        self.files = {part: [*(folder / "digits" / part).rglob("*.png")] for part in parts}
        self.catalog = folder / "catalog.json"
        entry = {"path": "digits", "type": "imagefolder"}
        self.catalog.write_text(json.dumps({"digits": entry}))
        self.common = f"--catalog {self.catalog} --workers 0 --device cpu --output-dir {folder}"
        self.longest = min(form.context_length, 48)  # tokens, cut to one of few lengths

    def views(self, part, resize=None, interpolation=None):
        resize, interpolation = resize or self.size, interpolation or self.form.interpolation
        return {central(path, self.size, resize, interpolation) for path in self.files[part]}

    def checkpoint(self):
        model = models.create_model("SLIP_KIND", 8, 8)
        args = {"model": "SLIP_KIND", "ssl_mlp_dim": 8, "ssl_emb_dim": 8}
        state = {"state_dict": model.state_dict(), "args": args}
        state["preprocessing"] = model.preprocessing.to_dict()
        torch.save(state, self.folder / "c.pt")
        return self.folder / "c.pt"

    def pairs(self, texts):
        """(COCO's captions file of the first test images, their folder)."""
        root = self.files["test"][0].parent
        images = [path for path in self.files["test"] if path.parent == root]
        names = [{"id": i, "file_name": path.name} for i, path in enumerate(images[: len(texts)])]
        captions = [{"image_id": i, "caption": text} for i, text in enumerate(texts)]
        path = self.folder / "captions.json"
        path.write_text(json.dumps({"images": names, "annotations": captions}))
        return path, root


@pytest.fixture
def stage(form, tmp_path):
    return Stage(form, tmp_path)


def test_training_takes_the_models_own(stage, seen, tiny):
    """Views, captions, the zero-shot set, held-out pairs, and all of it in the checkpoint."""
    form, size, folder = stage.form, stage.size, stage.folder
    rows = json.loads((tiny / "captions.json").read_text())["annotations"]
    rows = [row | {"caption": LONG} for row in rows]
    (folder / "long.json").write_text(json.dumps({"annotations": rows}))
    held_out, root = stage.pairs([LONG, "short"])
    (root / "train2017").symlink_to(root)
    with seen.during():
        extra = "--catalog", stage.catalog, "--metadata", folder / "long.json"
        extra += "--val-metadata", held_out, "--val-root", root
        flags = train_flags(tiny, folder / "run", *extra, model="SLIP_KIND")
        main.main(main.get_args_parser().parse_args(flags))
    assert stage.longest in seen.lengths and set(seen.lengths) <= {stage.longest, *PROMPTS}
    assert stage.views("test") <= seen.pixels(form)
    assert set(seen.crops) == {(size, form.interpolation)}
    assert set(seen.scales) == {(form.crop_min, 1.0), (0.08, 1.0)}

    model, _ = load_model(folder / "run/checkpoint.pt")
    assert model.preprocessing == replace(form, image_size=size)
    gelu = type(model.transformer.resblocks[0].mlp.gelu)
    assert gelu is towers.ACTIVATIONS[form.activation]
    assert model.tokenizer(LONG).shape == (form.context_length,)


def test_evaluations_take_the_models_own(stage, seen):
    form, folder, checkpoint = stage.form, stage.folder, stage.checkpoint()
    (folder / "prompts.json").write_text(json.dumps({"digits": [LONG + " {}"]}))
    with seen.during():
        flags = f"--datasets digits --templates {folder}/prompts.json"
        run(eval_zeroshot, f"--resume {checkpoint} {stage.common} {flags}")
    assert seen.pixels(form) == stage.views("test")
    assert set(seen.lengths) == {min(form.context_length, 43)}  # start, 40 words, class, end

    captions, root = stage.pairs([LONG, "short"])
    with seen.during():
        flags = f"--captions {captions} --root {root} --output-dir {folder}"
        run(eval_retrieval, f"--resume {checkpoint} {flags} --workers 0 --device cpu")
    assert seen.pixels(form) <= stage.views("test") and len(seen.pixels(form)) == 2
    assert max(seen.lengths) == stage.longest


def test_classifiers_take_the_models_own(stage, seen):
    form, size, flags = stage.form, stage.size, f"--pretrained {stage.checkpoint()} {stage.common}"
    flags += " --dataset digits --epochs 1 --batch-size 4"
    with seen.during():
        run(main_linear, f"{flags} --classifier knn")
    assert seen.pixels(form) == stage.views("train") | stage.views("test")

    with seen.during():
        run(main_linear, flags)
    assert stage.views("test", round(size * 256 / 224)) <= seen.pixels(form)
    assert set(seen.crops) == {(size, form.interpolation)}

    with seen.during():
        flags += " --preset small --aa none --color-jitter 0 --mixup 0 --cutmix 0 --reprob 0"
        run(main_finetune, f"{flags} --warmup-epochs 0")
    resize = main_finetune.resized_side(size)
    assert stage.views("test", resize, "bicubic") <= seen.pixels(form)


def test_registries_hold_the_choices():
    found = {"interpolation": transforms.INTERPOLATIONS, "activation": towers.ACTIVATIONS}
    found |= {"pooling": {*towers.POOLINGS, "mean"}, "tokenizer": tokenizer.TOKENIZERS}
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
    tokens = get_tokenizer(name)(["a dog", LONG])
    assert torch.equal(tokens, tokenizer.SimpleTokenizer()(["a dog", LONG]))


def test_an_unknown_tokenizer_lists_the_choices():
    with pytest.raises(
        InputError, match="unknown tower 'ViT-Z-99'; choose from VITS16, .*ViT-B-32"
    ):
        get_tokenizer("ViT-Z-99")
