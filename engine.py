"""The engine: one update, plain or exact over micro-batches and ranks, and one epoch.

Knows no model, loss or data. A model makes outputs of a batch of views, a criterion makes metrics
of these, {"loss": ...}; exact accumulation needs the model in two halves,
forward_head(forward_features(**views)).
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diagnosis import count_bad, describe_fault, skip_update
from infra.devices import Precision, Prefetcher
from infra.distributed import all_reduce, average_gradients, get_world_size
from infra.logger import writer
from utils import InputError, get_rng_state, natural, not_negative, positive_int, set_rng_state


def add_training_flags(add):
    """Adds the flags of every script that trains, with add_argument of their group."""
    add("--print-freq", default=10, type=positive_int, help="updates between readings of metrics")
    add("--skip-nonfinite", default=0, type=natural, help="updates a run may skip as nan or inf")
    add("--save-every-minutes", default=30, type=not_negative, help="also at epoch ends; 0: never")
    text = "writers of the log beside log.txt: tensorboard, wandb if it is installed"
    add("--report-to", default=["tensorboard"], nargs="*", type=writer, help=text)
    add("--keep-last", default=2, type=positive_int, help="checkpoints kept, the latest first")


@dataclass
class Training:
    """Everything that an update reads and changes."""

    model: nn.Module  # views -> outputs; on several ranks wrapped by DDP, unless `exact`
    criterion: callable  # outputs -> {"loss": ..., ...}
    optimizer: torch.optim.Optimizer
    schedule: np.ndarray  # the learning rate of each update of the run
    precision: Precision
    update_freq: int = 1  # micro-batches an update
    exact: bool = False  # the gradient of the whole batch, not the mean of the micro-batches'
    reduce_dtype: torch.dtype | None = None  # in which ranks sum gradients; None: their own
    clip_grad_norm: float = 0.0  # largest norm of the gradient; 0: any
    skip_nonfinite: int = 0  # updates of a run that may be skipped
    prepare: callable = lambda batch: batch  # on the device; not in autocast
    after_update: callable = lambda: None
    average: object = None  # an optimization.Average of the weights
    prefetcher: Prefetcher = field(init=False)

    def __post_init__(self):
        self.prefetcher = Prefetcher(self.precision.device, self.prepare)


# ---------------------------------------------------------------------------------------------
# Gradients of several micro-batches


def accumulate(training, micro_batches):
    """Adds the gradient of update_freq micro-batches to the parameters'; returns the metrics."""
    return (accumulate_exact if training.exact else accumulate_plain)(training, micro_batches)


def accumulate_plain(training, micro_batches):
    """The mean of the micro-batches' gradients; returns their mean metrics.

    Ranks synchronise at the last micro-batch.
    """
    t, sums = training, {}
    for i, batch in enumerate(micro_batches, start=1):
        views = t.prefetcher(batch)
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

    GradCache (Gao et al., arXiv:2101.06983), extended to heads with batch statistics.
    """
    t, parts, states, micro_batches = training, [], [], list(micro_batches)
    # The towers run without gradient, one micro-batch after the other.
    with torch.no_grad(), kept_buffers(t.model):
        for batch in micro_batches:
            views = t.prefetcher(batch)
            states.append(get_rng_state(t.precision.device))
            with t.precision.autocast():
                parts.append(t.model.forward_features(**views))

    # Heads and loss run once, on the features of all micro-batches.
    features = {v: torch.cat([part[v] for part in parts]) for v in parts[0]}
    for x in features.values():
        x.requires_grad_(x.is_floating_point())
    with t.precision.autocast():
        metrics = t.criterion(t.model.forward_head(features))
    t.precision.scaler.scale(metrics["loss"]).backward()
    trained = {view: x.grad for view, x in features.items() if x.grad is not None}
    gradients = {view: iter(x.split(len(parts[0][view]))) for view, x in trained.items()}

    # The towers run again, from the same random states, and backward with the features' gradients.
    for batch, state in zip(micro_batches, states, strict=True):
        views = {v: x for v, x in t.prefetcher(batch).items() if v not in t.model.locked_views}
        set_rng_state(state, t.precision.device)
        with t.precision.autocast():
            part = t.model.forward_features(**views)
        part = {view: x for view, x in part.items() if x.requires_grad}  # of towers that train
        if part:
            torch.autograd.backward(list(part.values()), [next(gradients[view]) for view in part])
    average_gradients(t.model, t.reduce_dtype)
    return {key: value.detach() for key, value in metrics.items()}


@contextmanager
def kept_buffers(model):
    """Undoes all changes of a model's buffers within: batch norm counts no batch twice."""
    copies = copy_buffers(model)
    try:
        yield
    finally:
        restore_buffers(model, copies)


def copy_buffers(model):
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def restore_buffers(model, copies):
    for buffer, kept in zip(model.buffers(), copies, strict=True):
        buffer.copy_(kept)


# ---------------------------------------------------------------------------------------------
# One update


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
    return accumulate(t, micro_batches)


def optimizer_step(training):
    t, metrics = training, {}
    if t.clip_grad_norm:
        t.precision.scaler.unscale_(t.optimizer)
        norm = nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad_norm)
        # The scaler leaves out an update whose gradient it scaled too far: that is no fault.
        metrics["grad_norm"] = norm.nan_to_num(0, 0) if t.precision.scaler.is_enabled() else norm
    t.precision.scaler.step(t.optimizer)
    t.precision.scaler.update()
    t.after_update()
    if t.average:
        t.average.update()
    return metrics


def update_if_finite(training, micro_batches, step):
    """The same, but if a rank's loss or the gradient is not finite, nothing changes.

    Returns (metrics, whether the step was taken), the latter equal on all ranks. Waits for the
    device, unlike update. A gradient that fp16 scaled too far is left to the scaler.
    """
    t = training
    copies = copy_buffers(t.model)
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


# ---------------------------------------------------------------------------------------------
# One epoch


class Batches:
    """A loader's batches without their notes; measures the time spent waiting for them.

    Each is fetched before the training on the one ahead of it: meanwhile the ranks agree on
    signals, and none waits for it. If a rank cannot get the batch, all stop before it.

    Notes are "bad", the reasons why samples had to be replaced, and "sources", the origin of each
    sample, kept by update.
    """

    def __init__(self, batches, number, training, run, before_save):
        self.batches, self.left = batches, number  # left to fetch
        self.training, self.run, self.before_save = training, run, before_save
        self.fetched, self.waited, self.bad, self.sources = [], 0.0, [], []

    def take(self, number):
        """Yields the micro-batches of an update. All ranks may stop before each of them."""
        device, bad, sources = self.training.precision.device, [], []
        batch = self.wait(self.before_save)
        # To stop between micro-batches is to stop before the update, as if they had not been.
        kept = number > 1 and (get_rng_state(device), copy_buffers(self.training.model))
        for i in range(number):
            if i:
                batch = self.wait(lambda: self.undo(*kept), is_whole=False)
            bad += batch.pop("bad", [])
            sources += batch.pop("sources", [])
            yield batch
        self.bad, self.sources = self.bad + bad, [*self.sources, sources]

    def wait(self, before_save, is_whole=True):
        """The next batch; fetches the one after it."""
        asked = time.perf_counter()
        if not self.fetched:
            self.fetch()
        self.run.obey(before_save, is_whole)
        batch = self.fetched.pop()
        if self.left:  # no agreement outlives the epoch
            self.fetch()
        self.waited += time.perf_counter() - asked
        return batch

    def fetch(self):
        self.left -= 1
        self.fetched.append(self.run.fetch(lambda: next(self.batches)))

    def undo(self, random, buffers):
        set_rng_state(random, self.training.precision.device)
        restore_buffers(self.training.model, buffers)
        self.before_save()

    def notes(self, updates):
        """(bad since the last call, sources of each of the `updates` after those asked for)."""
        bad, sources = self.bad, self.sources[:updates]
        self.bad, self.sources = [], self.sources[updates:]
        return bad, sources


def train_one_epoch(training, loader, run, print_freq=10, max_bad_fraction=0.01):
    """Trains from the update that the run is at to the end of its epoch.

    Args:
        training: the Training.
        loader: has start(epoch, batch), a length in micro-batches and a batch_size.
        run: an infra.run.Run, which fetches each batch: it may save before an update, or stop.
        print_freq: updates between readings of metrics. Each waits until the device has the next
            update, so that it is never without work.
        max_bad_fraction: of the epoch's samples that may be unreadable.

    Returns (means of the metrics over ranks and updates, speed and size of the epoch). Raises
    InputError, on all ranks at once, if a loss is not finite or too many samples are unreadable.
    """
    t, k, state = training, training.update_freq, run.state
    updates, batch_size = len(loader) // k, loader.batch_size * k * get_world_size()
    state.start_epoch(updates, batch_size)
    first, waited = state.epoch * updates, state.waited
    started = time.perf_counter() - state.elapsed

    def read_metrics():
        rows = state.meters.read()
        bad, sources = batches.notes(len(rows.get("loss", ())))
        count_bad(bad, run, updates * batch_size, max_bad_fraction)
        if not np.isfinite(state.meters.window).all():
            raise InputError(describe_fault(rows["loss"], sources, first + state.step - 1, run))

    def log_means(report):
        read_metrics()
        means, speed = state.meters.means(), state.speed()
        report(state.step, means, {**speed, "elapsed": state.elapsed})
        update = first + state.step - 1
        values = {**means, **speed, "lr": t.schedule[update]}
        run.log.scalars({f"train/{key}": x for key, x in values.items()}, update)

    is_trained = state.step == updates  # the run was stopped after it, in validation
    loaded = iter(()) if is_trained else loader.start(state.epoch, state.step * k)
    batches = Batches(loaded, (updates - state.step) * k, t, run, before_save=read_metrics)
    t.model.train()
    with run.log.progress(updates, f"epoch {state.epoch}", state.step) as report:
        for step in range(state.step, updates):
            # get batches, here the run may save or stop; forward, backward and optimizer step
            if t.skip_nonfinite:
                metrics, is_taken = update_if_finite(t, batches.take(k), first + step)
            else:
                metrics, is_taken = update(t, batches.take(k), first + step), True

            # now and then: the means up to the update before, while the device works on this one
            if step and step % print_freq == 0:
                log_means(report)
            if is_taken:
                state.meters.update(metrics)
            else:
                skip_update(t, metrics, batches.sources.pop(), first + step, run)
            state.advance(time.perf_counter() - started, waited + batches.waited)
        if not is_trained:
            log_means(report)
    size = {"pairs": state.step * batch_size, "bad_samples": state.bad}
    return state.meters.averages(), state.speed() | size
