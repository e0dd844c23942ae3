"""One training update, one training epoch, and the evaluation pass; precision and accumulation.

Knows no model, loss or data: an update gets `loss_fn(batch) -> {"loss": ..., metric: ...}`.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from utils import InputError, Meters, gather_objects, get_rank, get_world_size, reduce_sum

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision:
    """bf16 or fp16 autocast, the latter with a gradient scaler, or fp32.

    name: None chooses bf16 where the GPU has it, fp16 where not, fp32 on the CPU.
    """

    def __init__(self, name, device):
        if name is None and device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.name = name or "fp32"
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self):
        dtype = PRECISIONS[self.name]
        return torch.autocast(self.device.type, dtype, enabled=self.name != "fp32")


def to_device(batch, device):
    """Moves a tensor, or the tensors within dicts, tuples and lists; the rest stays as it is."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


@dataclass
class Training:
    """What an update reads and changes."""

    model: nn.Module
    loss_fn: callable  # batch -> {"loss": ..., ...}; calls the model
    optimizer: torch.optim.Optimizer
    schedule: np.ndarray  # the learning rate of each update of the run
    precision: Precision
    update_freq: int = 1  # micro-batches an update
    prepare: callable = lambda batch: batch  # on the device, before loss_fn; not in autocast
    after_update: callable = lambda: None

    @property
    def device(self):
        return self.precision.device


def update(training, micro_batches, step):
    """Update number `step`: mean gradient of the micro-batches, one optimizer step.

    Returns the metrics, each the mean over the micro-batches, on the device. Ranks synchronise
    their gradients at the last micro-batch.
    """
    t = training
    for group in t.optimizer.param_groups:
        group["lr"] = float(t.schedule[step])  # a NumPy float is no plain data
    t.optimizer.zero_grad(set_to_none=True)
    sums = {}
    for i, batch in enumerate(micro_batches, start=1):
        batch = t.prepare(to_device(batch, t.device))
        is_ddp = isinstance(t.model, DistributedDataParallel)
        with t.model.no_sync() if is_ddp and i < t.update_freq else nullcontext():
            with t.precision.autocast():
                metrics = t.loss_fn(batch)
            t.precision.scaler.scale(metrics["loss"] / t.update_freq).backward()
        for key, value in metrics.items():
            sums[key] = sums.get(key, 0) + value.detach() / t.update_freq
    t.precision.scaler.step(t.optimizer)
    t.precision.scaler.update()
    t.after_update()
    return sums


class BadSamples:
    """Counts the samples of an epoch that had to be replaced, over all ranks, and names them.

    Batches list the reasons under "bad". Raises InputError, on every rank at once, above
    `fraction` of the epoch's `samples`.
    """

    def __init__(self, samples, fraction, log):
        self.samples, self.fraction, self.log = samples, fraction, log
        self.new, self.count = [], 0

    def take_from(self, batches):
        for batch in batches:
            if isinstance(batch, dict):
                self.new += batch.pop("bad", [])

    def check(self, device):
        new = int(reduce_sum(torch.tensor(len(self.new), device=device)))
        if not new:
            return
        reasons, self.new = gather_objects(self.new), []
        for reason in reasons:
            self.log.say_once(f"replaced by the next sample: {reason}")
        self.count += new
        if self.count > self.fraction * self.samples:
            raise InputError(
                f"{self.count} of the epoch's {self.samples} samples cannot be read, more than "
                f"--max-bad-fraction {self.fraction:g}; the latest: {reasons[-1]}"
            )


def train_one_epoch(training, loader, epoch, log, print_freq=10, max_bad_fraction=0.01):
    """An epoch of updates; returns (the epoch's means over all ranks, its speed and size).

    Metrics stay on the device and are read every print_freq updates. Raises InputError on every
    rank at once when the loss is not finite, or too many samples cannot be read.
    """
    updates = len(loader) // training.update_freq
    first = epoch * updates
    meters, batches = Meters(), iter(loader)
    samples = loader.batch_size * training.update_freq * get_world_size()
    bad = BadSamples(updates * samples, max_bad_fraction, log)
    started, waited, seen = time.perf_counter(), 0.0, 0
    training.model.train()
    with log.progress(updates, f"epoch {epoch}") as progress:
        for i in range(updates):
            asked = time.perf_counter()
            micro_batches = list(islice(batches, training.update_freq))
            waited += time.perf_counter() - asked
            bad.take_from(micro_batches)
            meters.update(update(training, micro_batches, first + i))
            seen += samples
            if (i + 1) % print_freq and i + 1 < updates:
                continue
            bad.check(training.device)
            means = meters.read()
            if not np.isfinite(means["loss"]):
                raise InputError(
                    f"loss is {means['loss']} by update {first + i} (epoch {epoch}); lower --lr, "
                    "lengthen --warmup-epochs or try --precision fp32"
                )
            elapsed = time.perf_counter() - started
            speed = {"samples_per_sec": seen / elapsed, "data_wait": waited / elapsed}
            progress(i + 1, means, {**speed, "elapsed": elapsed})
            values = {**means, **speed, "lr": training.schedule[first + i]}
            log.scalars({f"train/{key}": value for key, value in values.items()}, first + i)
    return meters.averages(), {**speed, "pairs": seen, "bad_samples": bad.count}


@torch.no_grad()
def predict(score_fn, width, dataset, precision, batch_size, workers):
    """score_fn(images on the device) -> (B, width), over a labelled set of n images.

    Returns (scores (n, width) float64, labels (n,) int64) on the CPU, in the set's order. Ranks
    share the images; each is counted once, and every rank returns the same, as one process would.
    """
    device = precision.device
    mine = torch.arange(get_rank(), len(dataset), get_world_size())
    loader = DataLoader(
        Subset(dataset, mine.tolist()),
        batch_size,
        num_workers=min(workers, len(mine)),
        pin_memory=device.type == "cuda",
    )
    # Ranks fill in their own rows of zeros, so that the sum over ranks is the whole.
    scores = torch.zeros(len(dataset), width + 1, dtype=torch.float64, device=device)
    for i, batch in enumerate(loader):
        rows = mine[i * batch_size : (i + 1) * batch_size].to(device)
        images, labels = to_device(batch, device)
        with precision.autocast():
            scores[rows, :-1] = score_fn(images).double()
        scores[rows, -1] = labels.double()
    scores = reduce_sum(scores).cpu()
    return scores[:, :-1], scores[:, -1].long()
