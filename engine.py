"""One training update: precision, batches on their way to the device, accumulation, compilation.

Knows no model, loss or data. A model makes outputs of a batch of views, a criterion metrics of
these, {"loss": ...}; exact accumulation needs the model in two halves, heads(towers(views)).
"""

from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import get_world_size, natural, random_state, reduce_sum, set_random_state

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
    add("--deterministic", action="store_true", help="the same bits every time, slower on CUDA")
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
    skip_nonfinite: int = 0  # updates of a run that may be left out
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
            states.append(random_state(t.precision.device))
            with t.precision.autocast():
                parts.append(t.model.towers(**views))

    features = {v: torch.cat([part[v] for part in parts]).requires_grad_() for v in parts[0]}
    with t.precision.autocast():
        metrics = t.criterion(t.model.heads(features))
    t.precision.scaler.scale(metrics["loss"]).backward()
    gradients = {view: iter(x.grad.split(len(parts[0][view]))) for view, x in features.items()}

    for batch, state in zip(micro_batches, states, strict=True):
        views = t.feed(batch)
        set_random_state(state, t.precision.device)
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
    state = random_state(device)
    try:
        with kept_buffers(model):
            yield
    finally:
        model.zero_grad()
        set_random_state(state, device)


def parallel(model, device):
    """The model as the ranks train it together; itself where there is one rank."""
    if get_world_size() == 1:
        return model
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def settle_buckets(training, views):
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
    metrics = set_gradient(training, micro_batches, step)
    return metrics | take_step(training)


def set_gradient(training, micro_batches, step):
    t = training
    for group in t.optimizer.param_groups:
        # A NumPy float would be no plain data in a checkpoint. Layer decay scales the rate.
        group["lr"] = float(t.schedule[step]) * group.get("lr_scale", 1.0)
    t.optimizer.zero_grad(set_to_none=True)
    return (accumulate_exact if t.exact else accumulate_plain)(t, micro_batches)


def take_step(training):
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
    metrics = set_gradient(t, micro_batches, step)
    checked = [metrics["loss"]]
    if not t.precision.scaler.is_enabled():
        checked += [p.grad.sum() for p in t.model.parameters() if p.grad is not None]
    faults = sum(~torch.isfinite(x).all() for x in checked)
    if not reduce_sum(faults.double()).item():
        return metrics | take_step(t), True
    restore_buffers(t.model, copies)
    t.optimizer.zero_grad(set_to_none=True)
    return metrics, False
