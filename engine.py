"""The engine: one update, exact over micro-batches and ranks, and one epoch, from any update on.

Knows no model, loss or data. A model makes outputs of a batch of views, a criterion metrics of
these, {"loss": ...}; exact accumulation needs the model in two halves, heads(towers(views)).
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from infra.devices import Precision, Prefetcher
from infra.distributed import (
    all_gather_object,
    all_reduce,
    average_gradients,
    broadcast_object,
    get_rank,
    get_world_size,
)
from infra.signals import NOTHING
from utils import InputError, get_rng_state, natural, not_negative, positive_int, set_rng_state

# ---------------------------------------------------------------------------------------------
# Batches, from the loader to the device


# ---------------------------------------------------------------------------------------------
# Compilation


# ---------------------------------------------------------------------------------------------
# Gradients of several micro-batches


@dataclass
class Training:
    """What an update reads and changes."""

    model: nn.Module  # views -> outputs; on several ranks wrapped by DDP, unless `exact`
    criterion: callable  # outputs -> {"loss": ..., ...}
    optimizer: torch.optim.Optimizer
    schedule: np.ndarray  # the learning rate of each update of the run
    precision: Precision
    update_freq: int = 1  # micro-batches an update
    exact: bool = False  # the gradient of the whole batch, not the mean of the micro-batches'
    clip_grad_norm: float = 0.0  # largest norm of the gradient; 0: any
    skip_nonfinite: int = 0  # updates of a run that may be left out
    prepare: callable = lambda batch: batch  # on the device; not in autocast
    after_update: callable = lambda: None
    feed: Prefetcher = field(init=False)

    def __post_init__(self):
        self.feed = Prefetcher(self.precision.device, self.prepare)


def accumulate_plain(training, micro_batches):
    """The mean of the micro-batches' gradients; returns their mean metrics.

    Ranks synchronise at the last micro-batch.
    """
    t, sums = training, {}
    for i, batch in enumerate(micro_batches, start=1):
        views = t.feed(batch)
        is_ddp = isinstance(t.model, DistributedDataParallel)
        with t.model.no_sync() if is_ddp and i < t.update_freq else nullcontext():
            with t.precision.autocast():
                metrics = t.criterion(t.model(**views))
            t.precision.scaler.scale(metrics["loss"] / t.update_freq).backward()
        for key, value in metrics.items():
            sums[key] = sums.get(key, 0) + value.detach() / t.update_freq
    return sums


def accumulate_exact(training, micro_batches):
    """The gradient of all micro-batches of all ranks as one batch; returns that batch's metrics.

    GradCache (Gao et al., arXiv:2101.06983), extended to heads with batch statistics: the towers
    run without gradient, batch by batch; heads and loss run once, on the features of all; then the
    towers run again, under the same random state, and pass on what the loss gave their features.
    """
    t, parts, states, micro_batches = training, [], [], list(micro_batches)
    with torch.no_grad(), kept_buffers(t.model):
        for batch in micro_batches:
            views = t.feed(batch)
            states.append(get_rng_state(t.precision.device))
            with t.precision.autocast():
                parts.append(t.model.towers(**views))

    features = {v: torch.cat([part[v] for part in parts]).requires_grad_() for v in parts[0]}
    with t.precision.autocast():
        metrics = t.criterion(t.model.heads(features))
    t.precision.scaler.scale(metrics["loss"]).backward()
    gradients = {view: iter(x.grad.split(len(parts[0][view]))) for view, x in features.items()}

    for batch, state in zip(micro_batches, states, strict=True):
        views = t.feed(batch)
        set_rng_state(state, t.precision.device)
        with t.precision.autocast():
            part = t.model.towers(**views)
        torch.autograd.backward(list(part.values()), [next(gradients[view]) for view in part])
    average_gradients(t.model)
    return {key: value.detach() for key, value in metrics.items()}


@contextmanager
def kept_buffers(model):
    """Undoes what happens to a model's buffers within: batch norm counts no batch twice."""
    copies = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        restore_buffers(model, copies)


@torch.no_grad()
def restore_buffers(model, copies):
    for buffer, kept in zip(model.buffers(), copies, strict=True):
        buffer.copy_(kept)


@contextmanager
def rehearsal(model, device):
    """What runs within leaves no trace in a model's buffers and gradients, nor in random states."""
    state = get_rng_state(device)
    try:
        with kept_buffers(model):
            yield
    finally:
        model.zero_grad()
        set_rng_state(state, device)


def warmup_ddp(training, views):
    """Has DDP arrange its buckets of gradients, for which it needs a backward pass, of any views.

    From then on a sum over ranks adds in the same order at every update. Otherwise the first one of
    a run that goes on would differ, in the last bits, from the same one of an undisturbed run.
    """
    t = training
    if not isinstance(t.model, DistributedDataParallel):
        return
    with rehearsal(t.model, t.precision.device):
        with t.precision.autocast():
            outputs = t.model(**views)
        sum(x.float().sum() for x in outputs.values() if x.requires_grad).backward()


def update(training, micro_batches, step):
    """Update number `step`: the gradient of update_freq micro-batches, one optimizer step.

    Returns the metrics, on the device: nothing here waits for it.
    """
    metrics = compute_gradients(training, micro_batches, step)
    return metrics | optimizer_step(training)


def compute_gradients(training, micro_batches, step):
    t = training
    for group in t.optimizer.param_groups:
        # A NumPy float would be no plain data in a checkpoint. Layer decay scales the rate.
        group["lr"] = float(t.schedule[step]) * group.get("lr_scale", 1.0)
    t.optimizer.zero_grad(set_to_none=True)
    return (accumulate_exact if t.exact else accumulate_plain)(t, micro_batches)


def optimizer_step(training):
    t, metrics = training, {}
    if t.clip_grad_norm:
        t.precision.scaler.unscale_(t.optimizer)
        norm = nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad_norm)
        metrics["grad_norm"] = norm
    t.precision.scaler.step(t.optimizer)
    t.precision.scaler.update()
    t.after_update()
    return metrics


def update_if_finite(training, micro_batches, step):
    """The same, but where a rank's loss or the gradient is not finite, all stays as it was.

    Returns (metrics, whether the step was taken), the latter equal on all ranks. Waits for the
    device, unlike update. A gradient that fp16 scaled too far is the scaler's affair.
    """
    t = training
    copies = [buffer.clone() for buffer in t.model.buffers()]
    metrics = compute_gradients(t, micro_batches, step)
    checked = [metrics["loss"]]
    if not t.precision.scaler.is_enabled():
        checked += [p.grad.sum() for p in t.model.parameters() if p.grad is not None]
    faults = sum(~torch.isfinite(x).all() for x in checked)
    if not all_reduce(faults.double()).item():
        return metrics | optimizer_step(t), True
    restore_buffers(t.model, copies)
    t.optimizer.zero_grad(set_to_none=True)
    return metrics, False


def add_training_flags(add):
    """The flags of every script that trains, with add_argument of their group."""
    add("--print-freq", default=10, type=positive_int, help="updates between readings of metrics")
    add("--skip-nonfinite", default=0, type=natural, help="updates a run may leave out as nan, inf")
    add(
        "--save-every-minutes", default=30, type=not_negative, help="besides epochs' ends; 0: never"
    )
    add("--keep-last", default=2, type=positive_int, help="checkpoints kept, the latest first")


class Batches:
    """A loader's batches, less what is not for the device; notes the time spent waiting for them.

    "bad" of a batch lists why samples had to be replaced, "sources" what its samples are; `notes`
    returns those of the batches since its last call.
    """

    def __init__(self, loader):
        self.batches, self.waited, self.bad, self.sources = iter(loader), 0.0, [], []

    def take(self, number):
        for _ in range(number):
            asked = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - asked
            self.bad += batch.pop("bad", [])
            self.sources.append(batch.pop("sources", []))
            yield batch

    def notes(self):
        notes, self.bad, self.sources = (self.bad, self.sources), [], []
        return notes


def check_bad(reasons, progress, samples, fraction, device, log):
    """Counts the samples that had to be replaced, over all ranks, and names them.

    Raises InputError, on every rank at once, above `fraction` of the epoch's `samples`.
    """
    if not all_reduce(torch.tensor(len(reasons), device=device)):
        return
    reasons = all_gather_object(reasons)
    for reason in reasons:
        log.say_once(f"replaced by the next sample: {reason}")
    progress.bad += len(reasons)
    if progress.bad > fraction * samples:
        raise InputError(
            f"{progress.bad} of the epoch's {samples} samples cannot be read, more than "
            f"--max-bad-fraction {fraction:g}; the latest: {reasons[-1]}"
        )


def describe_fault(losses, sources, update, epoch, log):
    """The first loss that is not finite, or the gradient, in words; log.dump lists its samples.

    losses: this rank's of its latest updates, the last of which is number `update`; sources: the
    samples of their micro-batches. Every rank calls it, and gets the same.
    """
    faults = all_gather_object([(i, get_rank(), x) for i, x in enumerate(losses)])
    faults = [fault for fault in faults if not np.isfinite(fault[2])]
    i, rank, loss = min(faults, default=(len(losses) - 1, 0, None))
    what = "gradient is not finite" if loss is None else f"loss is {loss}"
    update += i + 1 - len(losses)
    k = len(sources) // len(losses)
    mine = chain.from_iterable(sources[i * k : (i + 1) * k])
    samples = all_gather_object([{"rank": get_rank(), **source} for source in mine])
    facts = {"update": update, "epoch": epoch, "rank": rank, "loss": str(loss)}
    path = broadcast_object(log.dump(f"nonfinite-{update}.json", {**facts, "samples": samples}))
    return (
        f"{what} at update {update} (epoch {epoch}) on rank {rank}; lower --lr, lengthen "
        f"warm-up or try --precision fp32; its samples are listed in {path}"
    )


def train_one_epoch(
    training, loader, progress, log, print_freq=10, max_bad_fraction=0.01, keeper=None
):
    """The epoch that `progress` is in, from the update that it is at, to which the loader's sampler
    goes (go_to).

    Returns (the epoch's means over all ranks, its speed and size). Metrics stay on the device and
    are read every print_freq updates, and before `keeper`, asked after each, saves the run. Raises
    InputError on every rank at once when the loss is not finite, or too many samples cannot be
    read, and what keeper raises to stop.
    """
    t, k, epoch = training, training.update_freq, progress.epoch
    updates, samples = len(loader) // k, loader.batch_size * k * get_world_size()
    progress.start(updates, samples)
    first, total = epoch * updates, updates * samples
    loader.sampler.go_to(epoch, progress.step * k)
    batches = Batches(loader) if progress.step < updates else None
    if progress.random:
        set_rng_state(progress.random, t.precision.device)
        progress.random = None
    started, waited = time.perf_counter() - progress.elapsed, progress.waited

    def read(update):
        rows = progress.meters.read()
        bad, sources = batches.notes()
        check_bad(bad, progress, total, max_bad_fraction, t.precision.device, log)
        if not np.isfinite(progress.meters.window).all():
            raise InputError(describe_fault(rows["loss"], sources, update, epoch, log))

    t.model.train()
    with log.progress(updates, f"epoch {epoch}", progress.step) as report:
        for step in range(progress.step, updates):
            if t.skip_nonfinite:
                metrics, is_taken = update_if_finite(t, batches.take(k), first + step)
                if not is_taken:
                    skip_update(t, metrics, batches.sources, first + step, progress, log)
            else:
                metrics, is_taken = update(t, batches.take(k), first + step), True
            if is_taken:
                progress.meters.update(metrics)
            progress.advance(time.perf_counter() - started, waited + batches.waited)

            order = keeper.due() if keeper else NOTHING
            is_reported = progress.step % print_freq == 0 or progress.step == updates
            if order or is_reported or t.skip_nonfinite:
                read(first + step)
            if is_reported:
                means, speed = progress.meters.means(), progress.speed()
                report(progress.step, means, {**speed, "elapsed": progress.elapsed})
                values = {**means, **speed, "lr": t.schedule[first + step]}
                log.scalars({f"train/{key}": x for key, x in values.items()}, first + step)
            if order:
                log.flush()
                keeper.obey(order)
    size = {"pairs": progress.step * samples, "bad_samples": progress.bad}
    return progress.meters.averages(), progress.speed() | size


def skip_update(training, metrics, sources, update, progress, log):
    """Counts and names an update that was not taken. Raises InputError where it is one too many."""
    limit, epoch = training.skip_nonfinite, progress.epoch
    progress.skipped += 1
    fault = describe_fault([metrics["loss"].item()], sources, update, epoch, log)
    if progress.skipped > limit:
        raise InputError(f"over --skip-nonfinite {limit} updates of the run: {fault}")
    log.say(f"left out, {progress.skipped} of {limit}: {fault}")
