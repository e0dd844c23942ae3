"""Weights and models by one string, as weight_names.py lists them: open_weights, load_model.

    model, train_transform, eval_transform = create_model_and_transforms("ViT-B-32", "openai")

Files are strangers': only plain data is read, and memory is bounded by their size.
"""

import hashlib
import os
import sys
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import timm
import torch

import image_towers
import layouts
from infra import checkpoint, weights
from infra.distributed import is_main_process
from infra.untrusted import SLACK, first_line, memory_limit
from models import CLIP, Method, parse_name
from preprocessing import SLIP_PREPROCESSING, Preprocessing
from text_models import TextModel, with_text
from tokenizer import create_tokenizer
from towers import (
    CLIP_TOWERS,
    HF_TOWERS,
    QUICK_TOWERS,
    TOWERS,
    Tower,
    create_visual,
    find_tower,
    input_size,
    is_tower,
    resized,
)
from transforms import CenterCrop, CropAndFlip, ToInput
from utils import InputError
from weight_names import find_place, full_name, has_method, list_pretrained, named, tower_of

__all__ = ["create_model_and_transforms", "get_tokenizer", "list_pretrained", "load_model"]
__all__ += ["open_weights"]


@dataclass
class Weights:
    """Weights of a known model, and the form in which it wants its input.

    source: the string. path: of the file. name: METHOD_TOWER, or a tower's name if the file holds
    no more. method: a class of models.py. tower: its row, with the preprocessing that the weights
    want. state_dict: in our layout. args: of the training run; model at least. notes: for the user.
    """

    source: str
    path: str
    name: str
    method: type
    tower: Tower
    state_dict: dict
    args: Namespace
    notes: list = field(default_factory=list)

    def build(self, image_size=None):
        """The model, in eval mode on the CPU; positions are resampled to another image size."""
        sizes = head_sizes(self.args, self.state_dict)
        with bounded(self.path):
            model = self.method(resized(self.tower, image_size), *sizes)
        state = self.state_dict
        if "logit_bias" in state and isinstance(model, CLIP):
            model.add_logit_bias(0)
        if image_size:
            state = image_towers.resample_positions(state, model.visual)
        checkpoint.load_weights(model, state, self.source, f"its model, {self.name}")
        return model.eval()

    def build_vit(self, classes, drop_path=0.0, image_size=None):
        """The ViT of the image tower with a new head, for training.

        Positions are interpolated to another image size (BeiT's way: bicubic, not antialiased). The
        head starts at a thousandth of the usual weights, so that training starts from even
        probabilities (BeiT).

        Args:
            classes: outputs of the head.
            drop_path: rate of stochastic depth at the last block.
            image_size: in pixels; None: that of the weights.

        Returns (timm's VisionTransformer, its Preprocessing).

        Raises InputError for a tower that is no ViT and a size that its patches do not divide.
        """
        tower, path = resized(self.tower, image_size), self.path
        with bounded(path):
            vit = create_visual(tower, num_classes=classes, drop_path_rate=drop_path)
        if not isinstance(vit, timm.models.VisionTransformer):
            raise InputError(
                f"{path} holds {self.name}, whose image tower is no ViT; choose another"
            )
        torch.nn.init.trunc_normal_(vit.head.weight, std=2e-5)
        torch.nn.init.zeros_(vit.head.bias)
        head = {f"head.{key}": value for key, value in vit.head.state_dict().items()}
        with bounded(path):
            own = {k: v for k, v in self.state_dict.items() if k.startswith("visual.")}
            own = image_towers.resample_positions(own, vit, antialias=False)
        own = {key.removeprefix("visual."): value for key, value in own.items()}
        checkpoint.load_weights(vit, own | head, path, "the checkpoint and the image size")
        return vit, replace(tower.preprocessing, image_size=input_size(vit))

    def initialise(self, model):
        """Loads all that a new model shares with these weights; the rest stays as it is.

        Returns a note on both. Raises InputError if a part, such as the image tower, is in both and
        does not fit.
        """
        state = image_towers.resample_positions(self.state_dict, model.visual)
        own = model.state_dict()
        old_parts, new_parts = parts_of(state), parts_of(own)
        old, new = set(old_parts.values()), set(new_parts.values())
        shared = {key: value for key, value in state.items() if old_parts[key] in new}
        wanted = {key: value for key, value in own.items() if new_parts[key] in old}
        if faults := checkpoint.mismatches(wanted, shared):
            text = checkpoint.describe_mismatches(faults)
            raise InputError(f"weights {self.source} do not fit ({text}); choose their model")
        model.load_state_dict(shared, strict=False)
        lines = {"from": old & new, "new": new - old, "left out": old - new}
        parts = "; ".join(f"{k}: {', '.join(sorted(v))}" for k, v in lines.items() if v)
        return f"initialised from {self.source}; {parts}"

    def digest(self):
        """Of the file, and of all that is not in the file but decides on features."""
        digest = checkpoint.file_digest(self.path)
        if vars(self.args).keys() > {"model"}:  # a training run's file says all
            return digest
        return hashlib.sha256(f"{digest} {self.name} {self.tower}".encode()).hexdigest()


def head_sizes(args, state_dict):
    """(hidden, output) width of the SimCLR head, if there is one."""
    layers = (state_dict.get(f"image_mlp.layer{i}.weight", torch.empty(0)) for i in (1, 3))
    hidden, output = (layer.shape[0] if layer.ndim else 0 for layer in layers)
    return getattr(args, "ssl_mlp_dim", hidden), getattr(args, "ssl_emb_dim", output)


def parts_of(state_dict):
    """{key: its part of the model}."""
    parts = {
        "visual": "image tower",
        "image_mlp": "SimCLR head",
        "logit_bias": "bias of the sigmoid loss",
    }
    kind = "Hugging Face's text tower" if layouts.has_hf_text(state_dict) else "text tower"
    return {k: parts.get(k.partition(".")[0], f"{kind} and projections") for k in state_dict}


def open_weights(source, arch=None, averaged=False):
    """The Weights that a string names, as weight_names.py lists them.

    Args:
        source: the string.
        arch: name of the tower, needed if the file holds an image tower alone; a name of timm's.
        averaged: take the average of the weights, which a training run's file may hold as well.

    Raises InputError if there are none, and for a file that is unsafe, damaged, of an unknown
    layout, or of another tower than arch.
    """
    place = find_place(os.fspath(source))
    content = weights.read(place.path)
    try:
        if averaged:
            content = weights.averaged(content, place.path)
        if is_own_run(content.state, place.name or arch):
            found = of_run(source, place, content)
        elif (state := layouts.to_ours_if_pair(content.tensors)) is not None:
            found = of_pair(source, place, content, state, arch)
        else:
            found = of_image_tower(source, place, content.tensors, arch)
        check_named(arch, found.name)
    except InputError as error:
        raise InputError(f"weights {source}: {error}") from error
    for note in found.notes if is_main_process() else ():
        print(note, file=sys.stderr)
    return found


def check_named(wanted, name):
    if wanted and tower_of(wanted) != tower_of(name):
        raise InputError(f"it holds {tower_of(name)}, not {tower_of(wanted)}; choose the former")


def add_weights_flags(add):
    """--pretrained and --arch."""
    add("--pretrained", required=True, help="weights: a file, NAME:TAG, see docs/weights.md")
    add_arch_flag(add)


def add_arch_flag(add):
    add("--arch", help="tower by timm's name, if the file holds an image tower alone")


def is_own_run(state, named):
    """Whether a training run's file is ours or SLIP's; timm's also have args with a model."""
    name = getattr(state.get("args"), "model", None)
    if state and not named and not isinstance(name, str):
        raise InputError(
            "it does not say which model it holds; its args need one, as 'SLIP_VITB16'"
        )
    return isinstance(name, str) and has_method(name)


def of_run(source, place, content):
    """Of a checkpoint of a training run of ours."""
    args = content.state["args"]
    name = args.model
    check_named(place.name, name)
    saved, (method, tower) = content.state.get("preprocessing"), parse_name(name)
    form = SLIP_PREPROCESSING if saved is None else Preprocessing.from_dict(saved)
    text_model = content.state.get("text_model") or None
    text_model = text_model and TextModel.from_state(text_model)
    tower = with_text(replace(tower, preprocessing=form), text_model or tower.text_model)
    if text_model:  # before a large tower is built for a small file
        check_fits(name, tower, content.tensors)
    return Weights(source, place.path, name, method, tower, content.tensors, args)


def of_pair(source, place, content, state, arch):
    """Of a state dict with an image and a text tower, which does not say how it was trained."""
    text_model = place.text_model
    name = full_name(place.name or arch or layouts.match_tower(state, text_model))
    activation, notes = place.form.get("activation"), []
    is_told = place.name or arch or activation or tower_of(name) in HF_TOWERS
    is_openai = content.is_torchscript and "input_resolution" in content.tensors
    if is_openai or (content.is_torchscript and not is_told):
        activation = "quick_gelu"
        if not is_openai:
            notes.append(
                f"note: {source} is taken for one of OpenAI's archives, with QuickGELU; if it was "
                f"trained with GELU, give {tower_of(name)}:{source}"
            )
    if tower_of(name) in CLIP_TOWERS and activation == "quick_gelu":
        name = named(name, True)
    elif not is_told:
        notes.append(
            f"note: {source} does not tell its activation, GELU is assumed; if it was trained "
            f"with QuickGELU, as OpenAI's weights, give {tower_of(name)}-quickgelu:{source}"
        )
    method, tower = parse_name(name)
    tower = with_text(tower, text_model or tower.text_model)
    check_fits(name, tower, state)  # before a large model is built for a small file
    form = place.form | {"tokenizer": tower.preprocessing.tokenizer}
    form["pooling"] = tower.preprocessing.pooling
    if not tower.text_model:
        form["context_length"] = len(state["positional_embedding"])
    form["image_size"] = layouts.native_size(state) or form.get("image_size")
    if tower_of(name) in CLIP_TOWERS | QUICK_TOWERS | HF_TOWERS:
        form.pop("activation", None)  # the name says it
    is_foreign = "image_projection" not in content.tensors
    if is_foreign and tower_of(name) not in TOWERS and "mean" not in form:
        own, tag = timm_form(tower_of(name))
        form = {"mean": own.mean, "std": own.std, "interpolation": own.interpolation} | form
        notes.append(note_on_images(own, tag))
    tower = replace(tower, preprocessing=replace(tower.preprocessing, **form))
    return Weights(source, place.path, name, method, tower, state, Namespace(model=name), notes)


def check_fits(name, tower, state):
    """Raises InputError if the towers and projections are others; a head or bias may be there."""
    with torch.device("meta"):
        own = CLIP(tower).state_dict()
    both = layouts.without_extras(state)
    if faults := layouts.misfits(own, both)[0]:
        text = checkpoint.describe_mismatches(faults)
        raise InputError(f"they do not fit {name} ({text}); choose their tower")


def of_image_tower(source, place, tensors, arch):
    """Of a checkpoint of an image tower alone, in timm's keys below any prefix."""
    name = place.name or arch
    if name is None:
        keys = ", ".join(list(tensors)[:3])
        raise InputError(
            f"it holds no model of CLIP's kind ({keys}, ...); if it is an image tower, name its "
            "architecture"
        )
    tower, own = find_tower(name := tower_of(name)), []
    if name not in TOWERS:
        form, tag = timm_form(name)
        tower = replace(tower, preprocessing=form)
        own = [note_on_images(form, tag)]
    with bounded(place.path):
        visual = create_visual(tower)
    state, notes = image_towers.image_tower(tensors, visual)
    notes += own
    state = {f"visual.{key}": value for key, value in state.items()}
    return Weights(source, place.path, name, Method, tower, state, Namespace(model=name), notes)


def note_on_images(form, tag):
    return f"note: images take mean {form.mean} and {form.interpolation} resizing of timm's {tag}"


def timm_form(name):
    """(Preprocessing, name with tag) of timm's own weights; a tag chooses among several."""
    config = timm.get_pretrained_cfg(name)
    form = Preprocessing(mean=config.mean, std=config.std, interpolation=config.interpolation)
    return form, f"{name.partition('.')[0]}.{config.tag}"


# ---------------------------------------------------------------------------------------------
# Models


def load_model(source, image_size=None):
    """The model of a string of weights, as weight_names.py lists them.

    Returns (model in eval mode on the CPU, args of its training run: its name, model, at least).

    Raises InputError if there are none, and for a file that is unsafe, damaged, or of another kind.
    """
    found = open_weights(source)
    return found.build(image_size), found.args


def create_model_and_transforms(name_or_path, pretrained=None, device="cpu", image_size=None):
    """A model and the way from a picture to its input.

    Args:
        name_or_path: a model's or a tower's name, as "SLIP_VITB16" or "ViT-B-32", or a string of
            weights (weight_names.py).
        pretrained: with a name: a tag of list_pretrained, or a file; None: random weights.
        device: of the model.
        image_size: in pixels; None: the model's own.

    Returns (model in eval mode, transform for training, transform for evaluation): the transforms
    take a PIL image to (3, S, S) float32, normalised.

    Raises InputError as load_model.
    """
    name_or_path = os.fspath(name_or_path)
    is_name = not os.path.exists(name_or_path) and is_tower(tower_of(name_or_path))
    if pretrained or not is_name:
        source = f"{name_or_path}:{pretrained}" if pretrained else name_or_path
        model, _ = load_model(source, image_size)
    else:
        method, tower = parse_name(full_name(name_or_path))
        model = method(resized(tower, image_size), 4096, 256).eval()
    form = model.preprocessing
    training = CropAndFlip(form.image_size, form.crop_min, False, form.interpolation)
    return model.to(device), ToInput(training, form), ToInput(CenterCrop.of(form), form)


def get_tokenizer(name):
    """The tokenizer of a model or a tower by its name, as "SLIP_VITB16" or "ViT-B-32".

    Raises InputError for an unknown name.
    """
    tower = find_tower(name if is_tower(name) else tower_of(name))
    return create_tokenizer(tower.preprocessing, tower.text_model)


@contextmanager
def bounded(path):
    """For building the model that a checkpoint describes: memory is bounded by the file's size.

    On one thread, because OpenMP ends the process if a thread cannot start within the limit. Every
    failure is an InputError.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with memory_limit(4 * os.path.getsize(path) + SLACK):  # weights may be in half precision
            yield
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"checkpoint {path}: its model cannot be built: {reason}") from error
    finally:
        torch.set_num_threads(threads)
