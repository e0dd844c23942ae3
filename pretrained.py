"""From a checkpoint file to a model."""

import os
from contextlib import contextmanager

import torch

from infra.checkpoint import load, load_weights
from infra.untrusted import SLACK, first_line, memory_limit
from models import create_model
from utils import InputError


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

    On one thread, as a limit is fatal to OpenMP where a thread cannot start. Every failure is an
    InputError.
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


def load_model(path):
    """(model in eval mode on the CPU, args of its training run) from a checkpoint file."""
    state = load(path)
    args, name = state["args"], model_name(state, path)
    # Checkpoints of CLIP runs may lack the flags of the SimCLR head, which they have no use for.
    with bounded(path):
        model = create_model(
            name, getattr(args, "ssl_mlp_dim", 4096), getattr(args, "ssl_emb_dim", 256)
        )
    load_weights(model, state["state_dict"], path, f"its args, which say {name}")
    return model.eval(), args
