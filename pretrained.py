"""From a checkpoint file to a model: load_model, and the image tower alone with a new head."""

import os
from contextlib import contextmanager
from dataclasses import replace

import timm
import torch

from infra import checkpoint
from infra.untrusted import SLACK, first_line, memory_limit
from models import create_model, parse_name
from preprocessing import SLIP_PREPROCESSING, Preprocessing
from towers import create_visual, input_size
from utils import InputError


def load_model(path):
    """The model of a checkpoint file, ours or a released one.

    Returns (model in eval mode on the CPU, args of its training run).

    Raises InputError if the file is absent, unsafe, damaged, or of another kind.
    """
    state = checkpoint.load(path)
    args, name = state["args"], model_name(state, path)
    # Checkpoints of CLIP runs may lack the flags of the SimCLR head, which CLIP does not have.
    dims = getattr(args, "ssl_mlp_dim", 4096), getattr(args, "ssl_emb_dim", 256)
    with bounded(path):
        model = create_model(name, *dims, preprocessing_of(state))
    checkpoint.load_weights(model, state["state_dict"], path, f"its args, which say {name}")
    return model.eval(), args


def load_vit(path, classes, drop_path=0.0, image_size=None):
    """The ViT of a checkpoint's image tower with a new head, for training.

    Position embeddings are interpolated to another image size (BeiT's way: bicubic, not
    antialiased). The head starts at a thousandth of the usual weights, so that training starts from
    even probabilities (BeiT).

    Args:
        path: of the checkpoint file, ours or a released one.
        classes: outputs of the head.
        drop_path: rate of stochastic depth at the last block.
        image_size: in pixels; None: that of pre-training.

    Returns (timm's VisionTransformer, its Preprocessing).

    Raises InputError for a tower that is no ViT and a size that its patches do not divide.
    """
    state = checkpoint.load(path)
    name = model_name(state, path)
    _, tower = parse_name(name)
    with bounded(path):
        form = preprocessing_of(state)
        form = replace(form, image_size=image_size or form.image_size)
        tower = replace(tower, preprocessing=form)
        vit = create_visual(tower, num_classes=classes, drop_path_rate=drop_path)
    if not isinstance(vit, timm.models.VisionTransformer):
        raise InputError(f"{path} holds {name}, whose image tower is no ViT; choose another")
    size, patch = input_size(vit), vit.patch_embed.patch_size[0]
    if size % patch:
        raise InputError(f"image size {size} is no multiple of the patch of {patch} pixels")
    torch.nn.init.trunc_normal_(vit.head.weight, std=2e-5)
    torch.nn.init.zeros_(vit.head.bias)
    head = {f"head.{key}": value for key, value in vit.head.state_dict().items()}
    with bounded(path):
        weights = visual_weights(state["state_dict"], vit)
    checkpoint.load_weights(vit, weights | head, path, "the checkpoint and the image size")
    return vit, replace(form, image_size=size)


def preprocessing_of(state):
    """Checkpoints that hold none, as those released with the paper, have SLIP's."""
    saved = state.get("preprocessing")
    return SLIP_PREPROCESSING if saved is None else Preprocessing.from_dict(saved)


def visual_weights(state_dict, vit):
    """The image tower's entries of a model's state dict, positions interpolated to vit's grid."""
    weights = {
        key.removeprefix("visual."): value
        for key, value in state_dict.items()
        if key.startswith("visual.")
    }
    if "pos_embed" in weights:
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
            weights["pos_embed"],
            vit.patch_embed.grid_size,
            num_prefix_tokens=vit.num_prefix_tokens,
            antialias=False,  # timm's default is another kernel, when enlarging too
        )
    return weights


def model_name(state, path):
    """The name of the model that a loaded checkpoint holds."""
    name = getattr(state["args"], "model", None)
    if not isinstance(name, str):
        raise InputError(
            f"checkpoint {path} does not say which model it holds; its args need a model, as "
            "'SLIP_VITB16'"
        )
    return name


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
