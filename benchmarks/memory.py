"""The command memory of benchmark.py: the GPU memory of a training, computed without a GPU.

The model runs forward on fake tensors, which have a shape and a device but no memory, and autograd
names the tensors that it keeps for backward. Sizes are in GB (1e9 bytes).
"""

import argparse
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import layers
import losses
import main as main_script
import warmup
from infra.devices import PRECISIONS

GPUS = (24, 40, 80, 141)  # GB
RESERVE = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, gaps of the allocator
CUDA = torch.device("cuda")


def to_fake(model, device):
    """Replaces a model's tensors by fake ones; within a FakeTensorMode."""

    def empty(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, param in [*module.named_parameters(recurse=False)]:
            setattr(module, name, torch.nn.Parameter(empty(param)))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, empty(buffer))


@contextmanager
def autocast(dtype):
    """torch.autocast for CUDA, which refuses to work on a machine without it."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class FusedAttention(TorchFunctionMode):
    """Takes the fused kernels that CUDA takes; fake tensors alone would take plain products."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            query, key, value = args[:3]
            causal = kwargs.get("is_causal", False)
            if query.dtype == torch.float32:
                efficient = torch.ops.aten._scaled_dot_product_efficient_attention
                return efficient(query, key, value, None, True, 0.0, causal)[0]
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, causal)[0]
        return function(*args, **kwargs)


def size_of(tensors):
    """Bytes of the tensors' storages, each counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def saved_activations(model, loss, views):
    """The tensors that autograd keeps for backward, without the parameters."""
    own, saved = {p.untyped_storage()._cdata for p in model.parameters()}, []

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model(**views))
    return saved


def measure(args, batch_size, device=CUDA):
    """{part: bytes} of a training of main.py's flags with that batch on each GPU."""
    with torch.device("meta"):
        model, _ = main_script.create_model(args)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    with FakeTensorMode():
        to_fake(model, device)
        layers.lock_towers(model, args)
        dtype = PRECISIONS[precision_of(args)]
        views = warmup.dummy_batch(model, batch_size, device)
        views = {v: x if v == "text" else x.to(dtype) for v, x in views.items()}
        with autocast(dtype), FusedAttention():
            loss = losses.create_loss(
                model.loss, args.ssl_temp, args.ssl_scale, clip_loss=args.clip_loss
            )
            saved = saved_activations(model, loss, views)
        trained = size_of(p for p in model.parameters() if p.requires_grad)
        weights = size_of(model.parameters()) + size_of(model.buffers())
        parts = {
            "weights": weights if args.ema_decay is None else 2 * weights,  # and their average
            "moments": 2 * trained,
            "gradients": trained,
            "activations": size_of(saved),
            "batches": 2 * size_of(views.values()),  # that of the update, and the next one
        }
    if args.grad_checkpointing:  # backward recomputes one block at a time
        whole = argparse.Namespace(**{**vars(args), "grad_checkpointing": False})
        activations = measure(whole, batch_size, device)["activations"]
        parts["recomputed"] = activations // len(model.visual.blocks)
    return parts


def precision_of(args):
    return "fp32" if args.disable_amp else args.precision or "bf16"


def largest_batch(args, limit):
    """The largest multiple of 8 whose training fits into `limit` bytes; 0 if 8 does not."""
    small, large = (sum(measure(args, size).values()) for size in (8, 16))
    each = (large - small) / 8  # bytes of a sample; the rest does not depend on the batch
    return max(0, int((limit - small + 8 * each) / each) // 8 * 8)


def benchmark_memory(options, flags):
    """Prints the parts for --batch-size, and the largest batch for GPUs of some sizes."""
    args = main_script.get_args_parser().parse_args(flags)
    parts = measure(args, args.batch_size)
    print(f"memory: {args.model}, {args.batch_size} per GPU, {precision_of(args)}, in GB")
    for name, size in parts.items():
        print(f"  {name:12} {size / 1e9:8.2f}")
    print(f"  {'together':12} {sum(parts.values()) / 1e9:8.2f}")
    if args.activation_budget is not None:
        print("  the activations are those without --activation-budget, which this ignores")
    print(f"the largest batch of a GPU, {RESERVE:.0%} of its memory left for CUDA and NCCL")
    for size in GPUS:
        print(f"  {size:4} GB {largest_batch(args, (1 - RESERVE) * size * 1e9):8}")
