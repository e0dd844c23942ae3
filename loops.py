"""The loops over data: a training epoch, which goes on at any update, and the evaluation pass.

A Progress says where a run is. Knows no model, loss or data set; engine.py has the update itself.
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from engine import Precision, to_device, update, update_if_finite
from interrupts import NOTHING, shield_worker
from utils import (
    InputError,
    Meters,
    from_main,
    gather_objects,
    get_rank,
    get_world_size,
    natural,
    not_negative,
    positive_int,
    reduce_sum,
    set_random_state,
)


def add_training_flags(add):
    """The flags of every script that trains, with add_argument of their group."""
    add("--print-freq", default=10, type=positive_int, help="updates between readings of metrics")
    add("--skip-nonfinite", default=0, type=natural, help="updates a run may leave out as nan, inf")
    add(
        "--save-every-minutes", default=30, type=not_negative, help="besides epochs' ends; 0: never"
    )
    add("--keep-last", default=2, type=positive_int, help="checkpoints kept, the latest first")


@dataclass
class Progress:
    """Where a run is: with weights, optimizer and random states all that it goes on from."""

    epoch: int = 0  # epochs finished
    step: int = 0  # updates done of the one after these
    updates: int = 0  # of the run
    samples: int = 0  # seen in the run
    batch: int = 0  # samples of an update, of all ranks
    bad: int = 0  # samples of the epoch that had to be replaced
    skipped: int = 0  # updates of the run left out by --skip-nonfinite
    elapsed: float = 0.0  # seconds of the epoch,
    waited: float = 0.0  # and those of them spent waiting for data
    best_acc1: float = 0.0
    meters: Meters = field(default_factory=Meters)  # of the epoch
    random: dict | None = None  # this rank's random state to go on with

    def state_dict(self):
        fields = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del fields["random"]  # of all ranks, in a place of its own
        return fields | {"meters": self.meters.state_dict()}

    def load_state_dict(self, state):
        """Raises TypeError or KeyError where it is none."""
        meters, numbers = state["meters"], {k: v for k, v in state.items() if k != "meters"}
        known = {f.name: f.type for f in dataclasses.fields(self)}
        for name, value in numbers.items():
            if known[name] not in (int, float) or not isinstance(value, known[name]) or value < 0:
                raise TypeError(name)
            setattr(self, name, value)
        self.meters.load_state_dict(meters)

    def start(self, updates, batch):
        """Before an epoch of `updates` updates of `batch` samples. Where the run went on with
        another batch in mid-epoch, the updates done are counted in the new one."""
        if self.step and self.batch != batch:
            self.step = min(self.step * self.batch // batch, updates)
        elif not self.step:
            self.bad, self.elapsed, self.waited, self.meters = 0, 0.0, 0.0, Meters()
        self.batch = batch

    def advance(self, elapsed, waited):
        """After an update; seconds of the epoch so far."""
        self.step, self.updates = self.step + 1, self.updates + 1
        self.samples += self.batch
        self.elapsed, self.waited = elapsed, waited

    def finish_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0

    def speed(self):
        """Samples per second and the share of time spent waiting for data, of the epoch."""
        elapsed = max(self.elapsed, 1e-9)
        return {
            "samples_per_sec": self.step * self.batch / elapsed,
            "data_wait": self.waited / elapsed,
        }


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
    if not reduce_sum(torch.tensor(len(reasons), device=device)):
        return
    reasons = gather_objects(reasons)
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
    faults = gather_objects([(i, get_rank(), x) for i, x in enumerate(losses)])
    faults = [fault for fault in faults if not np.isfinite(fault[2])]
    i, rank, loss = min(faults, default=(len(losses) - 1, 0, None))
    what = "gradient is not finite" if loss is None else f"loss is {loss}"
    update += i + 1 - len(losses)
    k = len(sources) // len(losses)
    mine = chain.from_iterable(sources[i * k : (i + 1) * k])
    samples = gather_objects([{"rank": get_rank(), **source} for source in mine])
    facts = {"update": update, "epoch": epoch, "rank": rank, "loss": str(loss)}
    path = from_main(log.dump(f"nonfinite-{update}.json", {**facts, "samples": samples}))
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
        set_random_state(progress.random, t.precision.device)
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
                    leave_out(t, metrics, batches.sources, first + step, progress, log)
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


def leave_out(training, metrics, sources, update, progress, log):
    """Counts and names an update that was not taken. Raises InputError where it is one too many."""
    limit, epoch = training.skip_nonfinite, progress.epoch
    progress.skipped += 1
    fault = describe_fault([metrics["loss"].item()], sources, update, epoch, log)
    if progress.skipped > limit:
        raise InputError(f"over --skip-nonfinite {limit} updates of the run: {fault}")
    log.say(f"left out, {progress.skipped} of {limit}: {fault}")


# ---------------------------------------------------------------------------------------------
# Evaluation


@dataclass
class Evaluation:
    """How a model runs over a labelled set."""

    precision: Precision
    batch_size: int = 256  # images per rank and step
    workers: int = 10
    check: callable = lambda: None  # called before each batch by all ranks; raises to stop there


def share_of(dataset, evaluation):
    """This rank's batches of a labelled set: (row numbers, images and labels on the device).

    Rank r of N has the rows r, r + N, ...: each is seen once, whatever N.
    """
    e, device = evaluation, evaluation.precision.device
    mine = torch.arange(get_rank(), len(dataset), get_world_size())
    loader = DataLoader(
        Subset(dataset, mine.tolist()),
        e.batch_size,
        num_workers=min(e.workers, len(mine)),
        pin_memory=device.type == "cuda",
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # of its workers' seeds: takes none of the run's numbers
    )
    batches = iter(loader)
    for start in range(0, math.ceil(len(dataset) / get_world_size()), e.batch_size):
        e.check()
        if start < len(mine):  # a rank may have a batch less than others
            yield mine[start : start + e.batch_size], *to_device(next(batches), device)


def check_finite(outputs):
    """A model's outputs, which would lose every comparison unnoticed if they were not numbers."""
    if outputs.isfinite().all():
        return outputs
    raise InputError(
        "the model's outputs are not finite: its checkpoint's weights are most likely not; take "
        "another checkpoint, or try --precision fp32"
    )


@torch.no_grad()
def predict(score_fn, width, dataset, evaluation):
    """score_fn(images on the device) -> (B, width), over a labelled set of n images.

    Returns (scores (n, width) float64, labels (n,) int64) on the CPU, in the set's order. Each
    image is counted once, and every rank returns the same, as one process would.
    """
    precision = evaluation.precision
    # Ranks fill in their own rows of zeros, so that the sum over ranks is the whole.
    scores = torch.zeros(len(dataset), width + 1, dtype=torch.float64, device=precision.device)
    for rows, images, labels in share_of(dataset, evaluation):
        rows = rows.to(precision.device)
        with precision.autocast():
            scores[rows, :-1] = score_fn(images).double()
        scores[rows, -1] = labels.double()
    scores = check_finite(reduce_sum(scores).cpu())
    return scores[:, :-1], scores[:, -1].long()
