"""The command save of benchmark.py: the time that training waits for a checkpoint."""

import os
import tempfile

import torch

import models
import optimization
from benchmarks.data import machine, timed
from benchmarks.training import synchronize
from infra import distributed
from infra.checkpoint_manager import CheckpointManager
from infra.run import TrainState


def trained_once(name, device):
    """A model and its optimizer, with all the moments that a checkpoint holds."""
    model = models.create_model(name).to(device)
    optimizer = torch.optim.AdamW(optimization.param_groups(model, 0.1), fused=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def benchmark_save(options):
    """Seconds that training waits for a save, and that its thread takes to write and verify it."""
    device = distributed.init_distributed(options.device)
    model, optimizer = trained_once(options.model, device)
    parts = {"state_dict": model, "optimizer": optimizer}
    facts = {"args": {"model": options.model}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        manager = CheckpointManager(folder, parts, TrainState(), device, facts, 2, 0, None, print)
        plain = {key: part.state_dict() for key, part in manager.parts.items()}
        print(f"save: {options.model} on {device.type}; {machine()}\n")
        for i in range(options.rounds):
            synchronize(device)
            (waits, _), (writes, _) = timed(manager.save), timed(manager.wait)
            usual, _ = timed(torch.save, plain, f"{folder}/plain.pt")
            size = os.path.getsize(manager.latest) / 1e9
            print(
                f"round {i}: training waits {waits:.3f} s, the thread writes {writes:.2f} s more; "
                f"torch.save alone {usual:.2f} s; {size:.2f} GB"
            )
        manager.close()
