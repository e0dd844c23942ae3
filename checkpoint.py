"""Checkpoints: saving without half-written files, safe loading, the keys of old and new ones.

A checkpoint is a dict: epoch, state_dict, optimizer, scaler, best_acc1, args. Those released with
the paper hold an argparse.Namespace, sometimes with a pathlib path, and keys that begin with
"module.", and their optimizer holds a NumPy float; ours, which keeper.py makes, hold more, but
plain data. No other class is ever built from a file.
"""

import argparse
import hashlib
import os
import pathlib
import pickle
import zipfile

import numpy as np
import torch

import utils
from files import first_line
from models import create_model
from utils import InputError


def read_scalar(dtype, data):
    """A pickled NumPy number -> a Python one."""
    return np.frombuffer(data, dtype)[0].item()


# Names a released checkpoint may contain. Its paths become pure ones, which touch no disk.
SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype("float64")),
    (read_scalar, "numpy.core.multiarray.scalar"),
    (read_scalar, "numpy._core.multiarray.scalar"),  # NumPy 2
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),  # Python 3.13 and newer
]

# What an optimizer holds of each parameter, in its shape.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}


def save(path, state, prove=lambda path: None):
    """Writes beside `path`, flushes, renames: an interrupted save leaves the old file."""
    utils.write_atomically(path, lambda file: torch.save(state, file), prove)


def prove(path):
    """Raises InputError unless every byte of a checkpoint of ours is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"checkpoint {path} is damaged: {first_line(error)}") from error
    if broken:
        raise InputError(f"checkpoint {path} is damaged: the checksum of {broken} differs")


# ---------------------------------------------------------------------------------------------
# Resuming


def restore(state, path, parts, check="--model"):
    """Loads a checkpoint's dict into what it was saved of, {its key: what has a state_dict}.

    Raises InputError where something does not fit; `check` is the flag to look at.
    """
    load_weights(parts["state_dict"], state["state_dict"], path, check)
    missing = {"optimizer", "epoch"} - state.keys()
    if missing:
        raise InputError(f"checkpoint {path} holds no {', '.join(missing)} to go on from")
    restore_optimizer(parts["optimizer"], state["optimizer"], path)
    for key in parts.keys() - {"state_dict", "optimizer"}:
        if state.get(key):  # a scaler's is empty where a run used none
            try:
                parts[key].load_state_dict(state[key])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"checkpoint {path}: its {key} is of another kind") from error


def restore_optimizer(optimizer, saved, path):
    """Loads moments, step counts and rates; weight decay, betas and eps stay those of the flags.

    Moments take their parameter's layout in memory, which fused AdamW relies on.
    """
    names = MOMENTS[type(optimizer)]
    own = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    try:
        fits = [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in own]
        for i, moments in saved["state"].items():  # fused AdamW trusts these shapes
            fits &= torch.is_tensor(moments.get("step", torch.zeros(())))
            fits &= all(params[i].shape == moments[k].shape for k in names)
        for mine, theirs in zip(own, saved["param_groups"], strict=True):
            mine["lr"] = float(theirs["lr"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise InputError(f"checkpoint {path}: its optimizer is of another model; check --model")
    state = {
        i: moments | {k: torch.empty_like(params[i]).copy_(moments[k]) for k in names}
        for i, moments in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": own})


# ---------------------------------------------------------------------------------------------
# Loading


def file_digest(path):
    """The SHA-256 of a file. Raises InputError if it is absent."""
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is absent; check --pretrained")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpacked_size(path):
    """Bytes that a checkpoint's zip claims to hold; torch.save packs nothing, so never more."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def load(path):
    """The checkpoint's dict on the CPU, args as a Namespace, keys without "module.".

    Raises InputError if the file is absent, is no checkpoint, or holds anything but plain data.
    """
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is absent; check --resume")
    try:
        size = unpacked_size(path)
        if size > os.path.getsize(path):
            raise InputError(f"checkpoint {path} is refused: it claims to unpack to {size} bytes")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch wraps the reason in advice to load the file unsafely; the reason is the context.
        reason = str(error.__context__ or error).splitlines()[0].split(" was not an allowed")[0]
        raise InputError(f"checkpoint {path} is refused, it is not plain data: {reason}") from error
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path} is damaged: {reason}") from error
    if not isinstance(state, dict) or not {"state_dict", "args"} <= state.keys():
        raise InputError(f"{path} is no checkpoint of a training run: state_dict or args is absent")
    args, weights = state["args"], state["state_dict"]
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    is_named = all(
        isinstance(d, dict) and all(isinstance(k, str) for k in d) for d in (args, weights)
    )
    if not is_named or not all(map(torch.is_tensor, weights.values())):
        raise InputError(f"checkpoint {path}: its state_dict or args is of another kind")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return {**state, "args": argparse.Namespace(**args), "state_dict": weights}


def load_weights(model, state_dict, path, check="--model"):
    """Strict loading. Raises InputError naming keys that are missing, surplus or of other shape,
    and the flag to `check`.
    """
    own = model.state_dict()
    faults = {
        "missing": [k for k in own if k not in state_dict],
        "unknown": [k for k in state_dict if k not in own],
        "of another shape": [
            k for k in own if k in state_dict and own[k].shape != state_dict[k].shape
        ],
    }
    if any(faults.values()):
        text = "; ".join(
            f"{len(keys)} keys {fault}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}"
            for fault, keys in faults.items()
            if keys
        )
        raise InputError(f"checkpoint {path} is of another model ({text}); check {check}")
    model.load_state_dict(state_dict)


def model_name(state, path):
    """The name of the model that a loaded checkpoint holds."""
    name = getattr(state["args"], "model", None)
    if not isinstance(name, str):
        raise InputError(f"checkpoint {path} does not say which model it holds")
    return name


def load_model(path):
    """(model in eval mode on the CPU, args of its training run) from a checkpoint file."""
    state = load(path)
    args, name = state["args"], model_name(state, path)
    # Checkpoints of CLIP runs may lack the flags of the SimCLR head, which they have no use for.
    model = create_model(
        name, getattr(args, "ssl_mlp_dim", 4096), getattr(args, "ssl_emb_dim", 256)
    )
    load_weights(model, state["state_dict"], path)
    return model.eval(), args
