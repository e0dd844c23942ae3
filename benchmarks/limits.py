"""Limits of the machine: the rates of matrix products and of copies."""

import time

import torch

SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices
BYTES = {"cuda": 2**30, "cpu": 2**28}  # of a copy
SUSTAINED = 3.0  # seconds of products, in which a GPU's clock falls to that which it can keep


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_rate(run, work, device, rounds=8):
    """The highest work / seconds of several calls of run()."""
    best = 0.0
    for _ in range(rounds + 2):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = max(best, work / (time.perf_counter() - started))
    return best


def sustained_rate(run, work, device):
    """Work / seconds of calls of run() for SUSTAINED seconds."""
    synchronize(device)
    calls, seconds, started = 0, 0.0, time.perf_counter()
    while seconds < SUSTAINED:
        run()
        synchronize(device)
        calls, seconds = calls + 1, time.perf_counter() - started
    return calls * work / seconds


def matrix_rates(precision):
    """TFLOP/s of products of square matrices in a precision: the best, and that which lasts."""
    device, n = precision.device, SIDE[precision.device.type]
    a, b, out = (torch.randn(n, n, device=device).to(precision.dtype) for _ in range(3))
    arguments = lambda: torch.matmul(a, b, out=out), 2 * n**3 / 1e12, device
    return {"matrices": best_rate(*arguments), "sustained": sustained_rate(*arguments)}


def copy_rate(device):
    """GB/s, read and written, of a copy within the device's memory."""
    size = BYTES[device.type]
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return best_rate(lambda: a.copy_(b), 2 * size, device) / 1e9
