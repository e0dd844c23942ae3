"""One training update, one training epoch, and the evaluation pass; precision and accumulation.

Knows no model, loss or data. A model makes outputs of a batch of views, a criterion metrics of
these, {"loss": ...}; exact accumulation needs the model in two halves, heads(towers(views)).
"""

import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from utils import (
    InputError,
    Meters,
    from_main,
    gather_objects,
    get_rank,
    get_world_size,
    natural,
    reduce_sum,
)

PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,  # matrices and convolutions multiplied with 10 bits of mantissa
    "fp32": torch.float32,
}


class Precision:
    """bf16 or fp16 autocast, the latter with a gradient scaler, or tf32 or fp32 throughout.

    name: None chooses bf16 where the GPU has it, fp16 where not, fp32 on the CPU.
    """

    def __init__(self, name, device):
        if name is None and device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.name = name or "fp32"
        self.device, self.dtype = device, PRECISIONS[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.name == "tf32"

    def autocast(self):
        is_half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if is_half else None, enabled=is_half)


def add_system_flags(parser):
    """The flags of every script that runs a model; returns add_argument of their group."""
    add = parser.add_argument_group("System").add_argument
    add("--precision", choices=PRECISIONS, help="by default the device's best")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"))
    add("-j", "--workers", default=10, type=natural, help="loader processes per rank")
    add("--dist-url", default="env://", help="where the ranks meet")
    return add


# ---------------------------------------------------------------------------------------------
# Batches, from the loader to the device


def to_device(batch, device):
    """Moves a tensor, or the tensors within dicts, tuples and lists; the rest stays as it is."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


class Feed:
    """Copies a batch to the device and prepares it there: prepare(batch) -> {view: tensor}.

    On CUDA both run on a stream of their own, beside the step that the device has still to do. The
    program gets no further ahead of the device than that step, so no more batches pile up there.
    """

    def __init__(self, device, prepare):
        self.device, self.prepare, self.steps = device, prepare, deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch):
        if self.stream is None:
            return self.prepare(to_device(batch, self.device))
        main = torch.cuda.current_stream(self.device)
        self.steps.append(main.record_event())
        if len(self.steps) > 1:
            self.steps.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            batch = self.prepare(to_device(batch, self.device))
        main.wait_stream(self.stream)
        for tensor in batch.values():
            tensor.record_stream(main)
        return batch


# ---------------------------------------------------------------------------------------------
# Compilation


def compile_modules(modules, trial):
    """Compiles modules by torch.compile where trial(), which should run them, then succeeds.

    Returns None, or, where everything now stays uncompiled, the reason. Each shape is compiled
    anew: those of a training run are few.
    """
    torch._dynamo.config.recompile_limit = 32  # five lengths of text, with and without gradient
    for module in modules:
        module.compile(dynamic=False)
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        torch.compiler.set_stance("force_eager")
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


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
    prepare: callable = lambda batch: batch  # on the device; not in autocast
    after_update: callable = lambda: None
    feed: Feed = field(init=False)

    def __post_init__(self):
        self.feed = Feed(self.precision.device, self.prepare)


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
            states.append(RandomState(t.precision.device))
            with t.precision.autocast():
                parts.append(t.model.towers(**views))

    features = {v: torch.cat([part[v] for part in parts]).requires_grad_() for v in parts[0]}
    with t.precision.autocast():
        metrics = t.criterion(t.model.heads(features))
    t.precision.scaler.scale(metrics["loss"]).backward()
    gradients = {view: iter(x.grad.split(len(parts[0][view]))) for view, x in features.items()}

    for batch, state in zip(micro_batches, states, strict=True):
        views = t.feed(batch)
        state.restore()
        with t.precision.autocast():
            part = t.model.towers(**views)
        torch.autograd.backward(list(part.values()), [next(gradients[view]) for view in part])
    average_gradients(t.model)
    return {key: value.detach() for key, value in metrics.items()}


class RandomState:
    """PyTorch's random state on the CPU and on a device."""

    def __init__(self, device):
        self.cpu = torch.get_rng_state()
        self.device = device if device.type == "cuda" else None
        self.cuda = torch.cuda.get_rng_state(device) if self.device else None

    def restore(self):
        torch.set_rng_state(self.cpu)
        if self.device:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def kept_buffers(model):
    """Undoes what happens to a model's buffers within: batch norm counts no batch twice."""
    copies = [buffer.clone() for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, copy in zip(model.buffers(), copies, strict=True):
            buffer.copy_(copy)


def average_gradients(model, bucket=2**25):
    """Replaces each gradient by its mean over the ranks, `bucket` numbers or more at a time."""
    if get_world_size() == 1:
        return
    waiting = []
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for i, gradient in enumerate(gradients, start=1):
        waiting.append(gradient)
        if sum(g.numel() for g in waiting) >= bucket or i == len(gradients):
            flat = torch.cat([g.flatten() for g in waiting])
            dist.all_reduce(flat)
            means = (flat / get_world_size()).split([g.numel() for g in waiting])
            for g, mean in zip(waiting, means, strict=True):
                g.copy_(mean.view_as(g))
            waiting = []


def update(training, micro_batches, step):
    """Update number `step`: the gradient of update_freq micro-batches, one optimizer step.

    Returns the metrics, on the device: nothing here waits for it.
    """
    t = training
    for group in t.optimizer.param_groups:
        # A NumPy float would be no plain data in a checkpoint. Layer decay scales the rate.
        group["lr"] = float(t.schedule[step]) * group.get("lr_scale", 1.0)
    t.optimizer.zero_grad(set_to_none=True)
    metrics = (accumulate_exact if t.exact else accumulate_plain)(t, micro_batches)
    if t.clip_grad_norm:
        t.precision.scaler.unscale_(t.optimizer)
        norm = nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad_norm)
        metrics["grad_norm"] = norm
    t.precision.scaler.step(t.optimizer)
    t.precision.scaler.update()
    t.after_update()
    return metrics


# ---------------------------------------------------------------------------------------------
# An epoch


class Batches:
    """A loader's batches, less what is not for the device; notes the time spent waiting for them.

    "bad" of a batch lists why samples had to be replaced, "sources" what its samples are.
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


class BadSamples:
    """Counts the samples of an epoch that had to be replaced, over all ranks, and names them.

    Raises InputError, on every rank at once, above `fraction` of the epoch's `samples`.
    """

    def __init__(self, samples, fraction, log):
        self.samples, self.fraction, self.log, self.count = samples, fraction, log, 0

    def check(self, reasons, device):
        if not reduce_sum(torch.tensor(len(reasons), device=device)):
            return
        reasons = gather_objects(reasons)
        for reason in reasons:
            self.log.say_once(f"replaced by the next sample: {reason}")
        self.count += len(reasons)
        if self.count > self.fraction * self.samples:
            raise InputError(
                f"{self.count} of the epoch's {self.samples} samples cannot be read, more than "
                f"--max-bad-fraction {self.fraction:g}; the latest: {reasons[-1]}"
            )


def check_finite(mean, losses, sources, update, epoch, log):
    """Raises InputError, on every rank at once, where the mean loss over all ranks is not finite.

    losses: this rank's of its latest updates, the last of which is number `update`; sources: the
    samples of their micro-batches. The first fault is named, log.dump lists its update's samples.
    """
    if np.isfinite(mean):
        return
    faults = [(i, get_rank(), x) for i, x in enumerate(losses) if not np.isfinite(x)]
    i, rank, loss = min(gather_objects(faults))
    update += i + 1 - len(losses)
    k = len(sources) // len(losses)
    mine = chain.from_iterable(sources[i * k : (i + 1) * k])
    samples = gather_objects([{"rank": get_rank(), **source} for source in mine])
    facts = {"update": update, "epoch": epoch, "rank": rank, "loss": str(loss)}
    path = from_main(log.dump(f"nonfinite-{update}.json", {**facts, "samples": samples}))
    raise InputError(
        f"loss is {loss} at update {update} (epoch {epoch}) on rank {rank}; lower --lr, lengthen "
        f"--warmup-epochs or try --precision fp32; its samples are listed in {path}"
    )


def train_one_epoch(training, loader, epoch, log, print_freq=10, max_bad_fraction=0.01):
    """An epoch of updates; returns (the epoch's means over all ranks, its speed and size).

    Metrics stay on the device and are read every print_freq updates. Raises InputError on every
    rank at once when the loss is not finite, or too many samples cannot be read.
    """
    k = training.update_freq
    updates = len(loader) // k
    first, samples = epoch * updates, loader.batch_size * k * get_world_size()
    meters, bad = Meters(), BadSamples(updates * samples, max_bad_fraction, log)
    started, batches = time.perf_counter(), Batches(loader)
    training.model.train()
    with log.progress(updates, f"epoch {epoch}") as progress:
        for i in range(updates):
            meters.update(update(training, batches.take(k), first + i))
            if (i + 1) % print_freq and i + 1 < updates:
                continue
            means, rows = meters.read()
            bad.check(batches.bad, training.precision.device)
            check_finite(means["loss"], rows["loss"], batches.sources, first + i, epoch, log)
            batches.bad, batches.sources = [], []
            elapsed = time.perf_counter() - started
            seen = (i + 1) * samples
            speed = {"samples_per_sec": seen / elapsed, "data_wait": batches.waited / elapsed}
            progress(i + 1, means, {**speed, "elapsed": elapsed})
            values = {**means, **speed, "lr": training.schedule[first + i]}
            log.scalars({f"train/{key}": value for key, value in values.items()}, first + i)
    return meters.averages(), {**speed, "pairs": seen, "bad_samples": bad.count}


def share_of(dataset, device, batch_size, workers):
    """This rank's batches of a labelled set: (row numbers, images and labels on the device).

    Rank r of N has the rows r, r + N, ...: each is seen once, whatever N.
    """
    mine = torch.arange(get_rank(), len(dataset), get_world_size())
    loader = DataLoader(
        Subset(dataset, mine.tolist()),
        batch_size,
        num_workers=min(workers, len(mine)),
        pin_memory=device.type == "cuda",
    )
    for i, batch in enumerate(loader):
        yield mine[i * batch_size : (i + 1) * batch_size], *to_device(batch, device)


@torch.no_grad()
def predict(score_fn, width, dataset, precision, batch_size, workers):
    """score_fn(images on the device) -> (B, width), over a labelled set of n images.

    Returns (scores (n, width) float64, labels (n,) int64) on the CPU, in the set's order. Each
    image is counted once, and every rank returns the same, as one process would.
    """
    device = precision.device
    # Ranks fill in their own rows of zeros, so that the sum over ranks is the whole.
    scores = torch.zeros(len(dataset), width + 1, dtype=torch.float64, device=device)
    for rows, images, labels in share_of(dataset, device, batch_size, workers):
        rows = rows.to(device)
        with precision.autocast():
            scores[rows, :-1] = score_fn(images).double()
        scores[rows, -1] = labels.double()
    scores = reduce_sum(scores).cpu()
    return scores[:, :-1], scores[:, -1].long()
