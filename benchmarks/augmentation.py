"""The command augment of benchmark.py: a view with --augment device, from uint8 to the tower."""

import logging
from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import transforms
from benchmarks.data import HEIGHT, SIZE, WIDTH, compare, machine, timed
from benchmarks.training import synchronize
from infra import devices, distributed
from preprocessing import IMAGENET_MEAN, IMAGENET_STD


def size_of(tree):
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if torch.is_tensor(x))


class KernelCounter(TorchDispatchMode):
    """Counts the operations that are no views, each a kernel on a GPU, and the bytes they move."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        aliases = [x.alias_info for x in function._schema.returns]
        if any(alias is None or alias.is_write for alias in aliases):
            self.kernels += 1
            self.bytes += size_of((args, kwargs, result))
        return result


def draw_view(number, device):
    """A batch of noise (B, 3, S, S) uint8 and its steps, on the device."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (number, 3, SIZE, SIZE), dtype=np.uint8))
    drawn = [transforms.draw_augmentation(rng, WIDTH, HEIGHT)[1] for _ in range(number)]
    return devices.to_device([pixels, transforms.pack_steps(drawn)], device)


def count_compiled(augment, *args):
    """(kernels, bytes) that the compiler makes of the module; on the CPU those of its C++ code."""
    from torch._dynamo.utils import counters  # importing these takes seconds
    from torch._inductor import compile_fx, metrics

    log = compile_fx.inductor_metrics_log
    log.setLevel(logging.INFO)  # otherwise the compiler does not count bytes
    log.propagate = False
    torch._inductor.config.force_disable_caches = True
    metrics.reset()
    counters.clear()
    augment.compile(dynamic=False)
    augment(*args)
    products = counters["inductor"]["extern_calls"]
    return metrics.generated_kernel_count + products, metrics.num_bytes_accessed


def benchmark_augment(args):
    """Kernels, bytes and time a sample to augment and normalise a view of SimCLR."""
    torch.set_num_threads(1)
    device = distributed.init_distributed(args.device)
    pixels, steps = draw_view(args.batch_size, device)
    eager, compiled = transforms.Augment(), transforms.Augment()

    def normalize(unit):
        return transforms.normalize(unit, IMAGENET_MEAN, IMAGENET_STD)

    def seconds(augment):
        synchronize(device)
        return timed(lambda: (normalize(augment(pixels, steps)), synchronize(device)))[0]

    print(f"augment: {args.batch_size} x {SIZE} x {SIZE} on {device.type}; {machine()}\n")
    with KernelCounter() as counter:
        unit = eager(pixels, steps)
    with KernelCounter() as last:
        normalize(unit)
    counts = {
        "eager": (counter.kernels, counter.bytes),
        "compiled": count_compiled(compiled, pixels, steps),
    }
    runs = {"eager": partial(seconds, eager), "compiled": partial(seconds, compiled)}
    for name, time in compare(runs, args.rounds).items():
        kernels, size = counts[name]
        print(
            f"  {name:8}  {kernels + last.kernels:4} kernels "
            f"{(size + last.bytes) / args.batch_size / 1e6:8.1f} MB a sample "
            f"{1e3 * time / args.batch_size:8.2f} ms a sample"
        )
