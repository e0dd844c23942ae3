"""Runs on one process or on several gloo ranks; the tests compare what it saves.

The global batch of 12 rows is the same: one process takes it whole, two ranks take halves.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from helpers import BareRun, InOrder, exact_training, seeded_embeddings, seeded_ids, views_of

import engine
import features
import losses
import models
import utils
import warmup
from evaluation import Evaluation, predict
from infra import compilation, devices, distributed, logger
from infra.run import Meters


class Numbered(Dataset):
    """11 images, the value of each its number: not divisible by two ranks."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.full((3,), float(index)), index % 3


def mine(rows):
    return rows.chunk(distributed.get_world_size())[distributed.get_rank()]


def loss_and_gradients(loss, dtype=torch.float32, **ids):
    rows = {k: mine(v).to(dtype).requires_grad_() for k, v in seeded_embeddings().items()}
    scalars = {"logit_scale": 1 / 0.07, "logit_bias": -10.0}
    rows |= {k: torch.tensor(x, dtype=dtype, requires_grad=True) for k, x in scalars.items()}
    metrics = loss({**rows, **ids})
    metrics["loss"].backward()
    gradients = {k: v.grad for k, v in rows.items()}
    return {"values": {k: v.item() for k, v in metrics.items()}, "gradients": gradients}


def full_losses():
    """With the gradient through all gathers, in float64."""
    clip, simclr = losses.CLIPLoss(gather_with_grad=True), losses.SIMCLRLoss(0.1)
    result = {
        "clip_full": loss_and_gradients(clip, torch.float64),
        "simclr_full": loss_and_gradients(simclr, torch.float64),
        "sigmoid_full": loss_and_gradients(losses.SigLIPLoss(), torch.float64),
        "sigmoid_open_clip": loss_and_gradients(open_clips_sigmoid_loss, torch.float64),
    }
    for duplicates in ("mask", "share"):
        for clip in losses.CLIP_LOSSES:
            loss = losses.create_loss("slip", 0.1, 1.0, True, clip, duplicates)
            result[f"{clip}_{duplicates}"] = loss_and_gradients(
                loss, torch.float64, ids=mine(seeded_ids())
            )
    return result


def open_clips_sigmoid_loss(outputs):
    path = Path(importlib.util.find_spec("open_clip").origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)  # all of it takes seconds
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    loss = module.SigLipLoss(rank=distributed.get_rank(), world_size=distributed.get_world_size())
    embeds = [F.normalize(outputs[f"{name}_embed"], dim=-1) for name in ("image", "text")]
    return {"loss": loss(*embeds, outputs["logit_scale"], outputs["logit_bias"])}


def head():
    """The SimCLR head in float64 through DDP: output, gradients and running statistics."""
    torch.manual_seed(0)
    module = models.SIMCLRHead(24, 16, 8).double()
    x = mine(seeded_embeddings()["aug1_embed"].double())
    weights = mine(seeded_embeddings()["aug2_embed"].double())[:, :8]
    wrapped = DistributedDataParallel(module) if distributed.get_world_size() > 1 else module
    output = wrapped(x)
    (output * weights).sum(1).mean().backward()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    return {
        "output": output.detach(),
        "gradients": {k: p.grad for k, p in module.named_parameters()},
        "statistics": {k: v for k, v in state.items() if "running" in k or "tracked" in k},
    }


def slip_gradients():
    """Every gradient of a small SLIP in float64, full CLIP gradient, averaged over ranks."""
    torch.manual_seed(0)
    model = models.create_model("SLIP_NANO8", 32, 16).double()
    loss = losses.create_loss("slip", gather_with_grad=True)
    images = [mine(torch.randn(12, 3, 32, 32).double()) for _ in range(3)]
    text = mine(torch.randint(1, 400, (12, 16)))
    wrapped = DistributedDataParallel(model) if distributed.get_world_size() > 1 else model
    views = dict(zip(("image", "aug1", "aug2"), images, strict=True), text=text)
    loss(wrapped(**views))["loss"].backward()
    return {k: p.grad for k, p in model.named_parameters()}


def accumulated(name, k, exact, with_ids=False, **options):
    """Gradients, metrics and buffers of one update of 16 samples, in k micro-batches a rank.

    Three are of unequal size.
    """
    t = exact_training(name, k, exact, **options)
    model = getattr(t.model, "module", t.model)
    metrics = engine.update(t, views_of(model, 16, k, with_ids), 0)
    return {
        "gradients": {key: p.grad for key, p in model.named_parameters()},
        "metrics": metrics,
        "buffers": dict(model.named_buffers()),
    }


LOCKS = "--lock-image --lock-image-unlocked-groups 2 --lock-text"
RATES = "--lr 1e-3 --lr-image 3e-4 --layer-decay 0.5 --ema-decay 0.5"


def updated(k):
    """Weights and their average after three updates with locks and rates by part."""
    t = exact_training("CLIP_NANO8", k, exact=k > 1, flags=f"{LOCKS} {RATES}".split())
    t.schedule = np.array([1e-3, 1e-3, 5e-4])
    model = getattr(t.model, "module", t.model)
    for step in range(3):
        engine.update(t, views_of(model, 16, k), step)
    return {"weights": model.state_dict(), "ema": t.average.module.state_dict()}


def flags_of(name):
    clip_loss, duplicates = name.split()
    return ["--clip-loss", clip_loss, "--duplicates", duplicates]


class Sourced(Dataset):
    """Six rows and their names on each rank; one of rank 1 is no number."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        number = 10 * distributed.get_rank() + index
        x = torch.full((3,), float("nan") if number == 12 else 1.0)
        return {"x": x, "sources": {"path": f"{number}.jpg"}}


def collate(items):
    return {"x": torch.stack([i["x"] for i in items]), "sources": [i["sources"] for i in items]}


def nonfinite(folder):
    """How a training ends whose second batch makes the loss of rank 1 no number."""
    model = torch.nn.Linear(3, 1)
    model.forward = lambda x, forward=model.forward: forward(x)
    training = engine.Training(
        model=model,
        criterion=lambda outputs: {"loss": outputs.square().mean()},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        schedule=np.full(6, 0.1),
        precision=devices.Precision("fp32", torch.device("cpu")),
    )
    loader = InOrder(Sourced(), 2, collate)
    log = logger.open_log(folder / "nonfinite")
    try:
        engine.train_one_epoch(training, loader, BareRun(log, epoch=1))
    except utils.InputError as error:
        return str(error), str(error).rpartition(" ")[2]


def evaluation(batch_size, workers):
    precision = devices.Precision("fp32", torch.device("cpu"))
    return Evaluation(precision, batch_size, workers)


def predictions():
    return predict(lambda x: x[:, :2], 2, Numbered(), evaluation(4, 0))


class Single(Numbered):
    def __len__(self):
        return 1


def few_predictions():
    """Fewer images than ranks."""
    return predict(lambda x: x[:, :2] + 1, 2, Single(), evaluation(4, 2))


class Pictures(Numbered):
    def __getitem__(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8), index % 3


def frozen_features(folder):
    """Features of 11 images by the ranks together; each has its own folder of one process."""
    path = str(folder / f"features{distributed.get_world_size()}" / "x")
    return features.extract(lambda x: x[:, :2, 0, 0], 2, Pictures(), path, evaluation(4, 0))


def meters():
    meter = Meters()
    for value in (1.0, 2.0):
        meter.update({"loss": torch.tensor(value + distributed.get_rank())})
    meter.read()
    return meter.means()


def compiled():
    """Gradients of a compiled model by DDP, and reasons if rank 1's compiler fails at the loss."""
    compilation.BACKEND, compilation.AFTERWARDS = "eager", "fail_on_recompile"
    t = exact_training("SLIP_NANO8", 2, exact=False)
    model = getattr(t.model, "module", t.model)
    batches = views_of(model, 16, 2)
    reasons = warmup.try_compilation(t, [*model.blocks(), *t.criterion.blocks()], batches)
    warmup.warmup_ddp(t, batches[0])
    engine.update(t, batches, 0)
    gradients = {key: p.grad for key, p in model.named_parameters()}

    def compiler(graph, inputs):
        if distributed.get_rank() == 1:
            raise RuntimeError("no such kernel")
        return graph.forward

    compilation.BACKEND = compiler
    t = exact_training("SLIP_NANO8", 2)
    fails = warmup.try_compilation(t, t.criterion.blocks(), batches)
    engine.update(t, batches, 0)
    return {"reasons": reasons, "gradients": gradients, "fails": fails}


def all_results(folder):
    names = ("CLIP_NANO8", "SIMCLR_NANO8", "SLIP_NANO8")
    result = {
        "exact": {(name, k): accumulated(name, k, True) for name in names for k in (1, 2, 3, 8)},
        "plain": {("SLIP_NANO8", 2): accumulated("SLIP_NANO8", 2, False)},
        "other_weights": [
            accumulated("SLIP_NANO8", 2, exact, seed=distributed.get_rank())
            for exact in (False, True)
        ],
        "bf16": [
            accumulated("SLIP_NANO8", 2, exact, flags=["--bf16-gradients"])
            for exact in (False, True)
        ],
        "locked": [
            accumulated("SLIP_NANO8", 2, exact, flags=LOCKS.split()) for exact in (False, True)
        ],
        "updated": [updated(k) for k in (1, 2)],
        "duplicates": {
            (name, k): accumulated("SLIP_NANO8", k, True, with_ids=True, flags=flags_of(name))
            for name in ("sigmoid share", "softmax mask", "softmax share")
            for k in (1, 2)
        },
        "ddp": accumulated("SLIP_NANO8", 1, False, with_ids=True, flags=flags_of("sigmoid mask")),
        "clip": loss_and_gradients(losses.CLIPLoss()),
        "simclr": loss_and_gradients(losses.SIMCLRLoss(0.1)),
        **full_losses(),
        "head": head(),
        "slip_gradients": slip_gradients(),
        "nonfinite": nonfinite(folder),
        "predictions": predictions(),
        "few_predictions": few_predictions(),
        "features": frozen_features(folder),
        "meters": meters(),
    }
    if distributed.get_world_size() > 1:
        result["compiled"] = compiled()
    return result


def main(folder):
    """Writes folder/rankR.pt, or one.pt: of three ranks the losses alone, else everything."""
    distributed.init_distributed("cpu")
    ranks = distributed.get_world_size()
    result = full_losses() if ranks == 3 else all_results(folder)
    name = f"rank{distributed.get_rank()}" if ranks > 1 else "one"
    torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
