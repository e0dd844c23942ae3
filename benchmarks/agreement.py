"""The command agreement of benchmark.py: the time that ranks spend on agreeing on signals."""

import time

import torch

from benchmarks.data import compare, machine
from infra import distributed
from infra.signals import SignalHandler
from utils import InputError


def train(work):
    """The work of a micro-batch and its sum over ranks, which takes up what they differ by."""
    work @ work
    distributed.all_reduce(torch.zeros(()))


def spent_per_update(signals, updates, update_freq, is_ahead, work):
    """Microseconds of an update in which this rank begins agreements and waits for them.

    Args:
        signals: a SignalHandler.
        updates: to measure.
        update_freq: micro-batches, and so agreements, of an update.
        is_ahead: whether each begins before the micro-batch ahead of it, or when it is needed.
        work: (n, n), for the work of a micro-batch.
    """
    spent, number = 0.0, updates * update_freq
    for i in range(number):
        began = time.perf_counter()
        if not is_ahead or not i:
            signals.ask()
        signals.agree()
        if is_ahead and i + 1 < number:
            signals.ask()
        spent += time.perf_counter() - began
        train(work)
    return spent / updates * 1e6


def benchmark_agreement(options):
    device = distributed.init_distributed("cpu")
    if distributed.get_world_size() == 1:
        raise InputError("one rank has nobody to agree with; start by torchrun --nproc-per-node 2")
    torch.set_num_threads(1)
    work, signals = torch.randn(512, 512, device=device), SignalHandler()
    runs = {
        (k, name): lambda k=k, name=name: spent_per_update(
            signals, options.micro_batches // k, k, name == "ahead", work
        )
        for k in (1, 16)
        for name in ("at once", "ahead")
    }
    medians = compare(runs, options.rounds)
    if distributed.is_main_process():
        print(f"{distributed.get_world_size()} ranks; {machine()}")
        for (k, name), value in medians.items():
            print(f"{k:2} agreements an update, {name:7} {value:6.0f} microseconds")
