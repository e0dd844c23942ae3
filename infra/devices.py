"""Devices: precision, and batches on their way to the device."""

from collections import deque

import torch

from utils import natural

PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,  # matrices and convolutions multiplied with 10 bits of mantissa
    "fp32": torch.float32,
}


class Precision:
    """bf16 or fp16 autocast, the latter with a gradient scaler, or tf32 or fp32 throughout.

    name: a row of PRECISIONS; None chooses bf16 if the GPU has it, else fp16, and fp32 on the CPU.
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
    add("--dist-url", default="env://", help="address that the ranks meet at")
    add("--deterministic", action="store_true", help="the same bits every time, slower on CUDA")
    return add


def to_device(batch, device):
    """Moves a tensor, or the tensors within dicts, tuples and lists; leaves the rest unchanged."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


class Prefetcher:
    """Copies a batch to the device and prepares it there: prepare(batch) -> {view: tensor}.

    On CUDA both run on a stream of their own, while the device still works on the last step. The
    program gets no further ahead of the device than that step, so no more batches pile up there.
    """

    def __init__(self, device, prepare):
        self.device, self.prepare, self.steps = device, prepare, deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch):
        if self.stream is None:
            return self.prepare(to_device(batch, self.device))
        main = torch.cuda.current_stream(self.device)
        # A blocking event leaves the core to the loader's workers while the program waits for it.
        self.steps.append(main.record_event(torch.cuda.Event(blocking=True)))
        if len(self.steps) > 1:
            self.steps.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            batch = self.prepare(to_device(batch, self.device))
        main.wait_stream(self.stream)
        for tensor in batch.values():
            tensor.record_stream(main)
        return batch
