"""Before the first update: torch.compile tries all that updates do, and DDP arranges its buckets.

Both leave no trace: gradients, batch statistics and random states are those from before.
"""

from argparse import BooleanOptionalAction
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

import engine
from infra.compilation import compile_modules
from tokenizer import LENGTHS
from transforms import IMAGE_VIEWS, pack_steps
from utils import InputError, get_rng_state, number, set_rng_state


def add_compile_flags(add):
    """Adds the flags of every script that trains, with add_argument of their group."""
    add("--compile", action=BooleanOptionalAction, help="torch.compile; by default on CUDA")
    text = "share of activations, below 1, that compiled blocks keep for backward; by default all"
    add("--activation-budget", type=number(float, 0, 1), metavar="F", help=text)


def is_compiled(args, device):
    return device.type == "cuda" if args.compile is None else args.compile


def check_flags(args, device):
    """Raises InputError if there is a budget for compiled blocks, but none are compiled."""
    if args.activation_budget is not None and not is_compiled(args, device):
        raise InputError(
            f"activation budget {args.activation_budget:g}: it acts in compiled blocks only; "
            "compile, or omit it"
        )


def dummy_batch(model, batch_size, device):
    """{view: tensor} in the shapes of a training batch of a models.Method, texts at their longest.

    Images are zeros; a text has one token, so that the batch is padded as most are.
    """
    size = (batch_size, 3, model.image_size, model.image_size)
    views = {view: torch.zeros(size, device=device) for view in model.views if view != "text"}
    if "text" in model.views:
        padding = model.text_tower.padding
        shape = batch_size, model.preprocessing.context_length
        views["text"] = torch.full(shape, padding, device=device)
        views["text"][:, 0] = abs(padding - 1)
    return views


def dummy_batches(model, batch_size, device, extra=None):
    """The same for every length that texts are cut to, the longest first.

    extra: {view: tensor} of each batch beside the method's views.
    """
    views = dummy_batch(model, batch_size, device) | (extra or {})
    if "text" not in views:
        return [views]
    lengths = views["text"].shape[1], *reversed(LENGTHS)
    return [views | {"text": views["text"][:, :length]} for length in lengths]


def as_loaded(views, augments_on_device):
    """A model's dummy batch as the loader would have made it: uint8 images, and steps if any."""
    raw = {v: x.byte() if v in IMAGE_VIEWS else x for v, x in views.items()}
    augmented = [v for v in ("aug1", "aug2") if v in views and augments_on_device]
    steps = {v: pack_steps([[]] * len(raw[v])).to(raw[v].device) for v in augmented}
    return {**raw, "steps": steps}


def unchanged(views):
    return views


def warm_up(training, modules, batches, log, args, prepare=unchanged):
    """Compiles if the flags say so, and has DDP arrange its buckets.

    Args:
        training: an engine.Training.
        modules: of its model and criterion, to compile.
        batches: prepared views, a batch in every shape that updates see, the largest first.
        log: takes the reasons if compilation fails.
        args: the flags of add_compile_flags.
        prepare: of a batch, in the trial; takes the prepared batches.
    """
    if is_compiled(args, training.precision.device):
        reasons = try_compilation(training, modules, batches, args.activation_budget, prepare)
        if reasons:
            log.info(
                "warning: torch.compile failed, training continues without it on all ranks: "
                + "; ".join(reasons)
            )
    warmup_ddp(training, batches[0])


def try_compilation(training, modules, batches, budget=None, prepare=unchanged):
    """Compiles modules for all shapes and modes of an update; returns the reasons if that fails.

    The trial is the gradient of all batches, on the model without DDP. See warm_up for the rest.
    """
    bare = getattr(training.model, "module", training.model)
    t = replace(training, model=bare, prepare=prepare)

    def trial():
        bare.train()
        with rehearsal(bare, t.precision.device):
            for i in range(0, len(batches), t.update_freq):
                taken = range(i, i + t.update_freq)
                engine.accumulate(t, [batches[j % len(batches)] for j in taken])

    return compile_modules(modules, trial, budget)


def warmup_ddp(training, views):
    """Has DDP arrange its buckets of gradients, which takes one backward pass, of any views.

    From then on a sum over ranks adds in the same order at every update. Otherwise the first update
    of a resumed run would differ, in the last bits, from the same one of an undisturbed run.
    """
    t = training
    if not isinstance(t.model, DistributedDataParallel):
        return
    with rehearsal(t.model, t.precision.device):
        with t.precision.autocast():
            outputs = t.model(**views)
        sum(x.float().sum() for x in outputs.values() if x.requires_grad).backward()


@contextmanager
def rehearsal(model, device):
    """Undoes all changes within of a model's buffers and gradients, and of random states."""
    state = get_rng_state(device)
    try:
        with engine.kept_buffers(model):
            yield
    finally:
        model.zero_grad()
        set_rng_state(state, device)
