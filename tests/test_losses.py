"""The losses: the archived code's figures, closed forms, symmetries, several ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import PeakMemory, seeded_embeddings
from launch import run_script

import contrast
from losses import CLIPLoss, SIMCLRLoss, SLIPLoss

LOSSES = {
    "clip": CLIPLoss(),
    "simclr_temp0.1": SIMCLRLoss(0.1),
    "slip_temp0.2_scale0.5": SLIPLoss(CLIPLoss(), SIMCLRLoss(0.2), 0.5),
}


def outputs(dtype=torch.float32):
    rows = {k: v.to(dtype).requires_grad_() for k, v in seeded_embeddings().items()}
    return {**rows, "logit_scale": torch.tensor(1 / 0.07, dtype=dtype)}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_archived_code(name, reference):
    batch, expected = outputs(), reference["losses"][name]
    metrics = LOSSES[name](batch)
    metrics["loss"].backward()
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected["values"], rel=1e-5)
    norms = {key: batch[key].grad.norm().item() for key in expected["grad_norm"]}
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "simclr"])
@pytest.mark.parametrize("rank", ["rank0", "rank1"])
def test_two_ranks_equal_the_archived_code(name, rank, reference, two_ranks):
    got, expected = two_ranks[rank][name], reference["losses_2_ranks"][rank][name]
    assert got["values"] == pytest.approx(expected["values"], rel=1e-5)
    norms = {key: got["gradients"][key].norm().item() for key in expected["grad_norm"]}
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-5)
    scale = got["gradients"]["logit_scale"]
    if expected["logit_scale_grad"] is None:
        assert scale is None
    else:
        assert scale.item() == pytest.approx(expected["logit_scale_grad"], rel=1e-4)


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run = run_script("tests/ranks.py", [folder], ranks=3)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{r}.pt") for r in range(3)]


FULL = ["clip_full", "simclr_full", "sigmoid_full"]
FULL += [f"{clip}_{how}" for clip in ("softmax", "sigmoid") for how in ("mask", "share")]


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("number", [2, 3])
def test_gathering_with_gradient_equals_one_process(name, number, two_ranks, three_ranks):
    results = three_ranks if number == 3 else [two_ranks["rank0"], two_ranks["rank1"]]
    one, ranks = two_ranks["one"][name], [result[name] for result in results]
    for key, value in one["values"].items():
        mean = sum(r["values"][key] for r in ranks) / number
        assert mean == pytest.approx(value, rel=1e-6), key
    for key, value in one["gradients"].items():
        if value is None:
            continue
        parts = [r["gradients"][key] / number for r in ranks]  # DDP averages over ranks
        got = sum(parts) if key.startswith("logit_") else torch.cat(parts)
        assert torch.allclose(got, value, rtol=1e-12, atol=1e-14), key


def test_every_slip_gradient_on_two_ranks_equals_one_process(two_ranks):
    for key, value in two_ranks["one"]["slip_gradients"].items():
        for rank in ("rank0", "rank1"):
            got = two_ranks[rank]["slip_gradients"][key]
            # atol: biases before a batch norm have no effect, their gradient is rounding alone.
            assert torch.allclose(got, value, rtol=1e-9, atol=1e-12), key


def plain_clip(outputs):
    image, text = (F.normalize(outputs[k], dim=-1) for k in ("image_embed", "text_embed"))
    logits, labels = outputs["logit_scale"] * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_simclr(outputs, temperature=0.1):
    n = len(outputs["aug1_embed"])
    both = F.normalize(torch.cat([outputs["aug1_embed"], outputs["aug2_embed"]]), dim=-1)
    logits = (both @ both.T / temperature).masked_fill(torch.eye(2 * n, dtype=bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


@pytest.mark.parametrize(
    "loss, plain, names",
    [
        (CLIPLoss(), plain_clip, ("image_embed", "text_embed", "logit_scale")),
        (SIMCLRLoss(), plain_simclr, ("aug1_embed", "aug2_embed")),
    ],
)
def test_rows_at_a_time_equal_the_whole_matrix(loss, plain, names):
    n = 2 * contrast.ROWS + 100
    generator = torch.Generator().manual_seed(0)
    rows = {k: torch.randn(n, 8, generator=generator, dtype=torch.float64) for k in names[:2]}
    rows["logit_scale"] = torch.tensor(10.0, dtype=torch.float64)
    rows = {k: v.requires_grad_() for k, v in rows.items()}
    values, gradients = [], []
    for function in (lambda x: loss(x)["loss"], plain):
        values.append(function(rows))
        gradients.append(torch.autograd.grad(values[-1], [rows[k] for k in names]))
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("loss", [CLIPLoss(), SIMCLRLoss()])
def test_memory_grows_linearly_with_the_batch(loss, monkeypatch):
    monkeypatch.setattr(contrast, "ROWS", 64)

    def peak(n):
        rows = {k: torch.randn(n, 8, requires_grad=True) for k in seeded_embeddings()}
        with PeakMemory() as memory:
            loss({**rows, "logit_scale": torch.tensor(10.0)})["loss"].backward()
        return memory.peak

    assert 3 < peak(2048) / peak(512) < 5  # the whole matrix: 16


def test_closed_forms_of_equal_embeddings():
    n, same = 6, torch.ones(6, 8)
    batch = dict.fromkeys(("image_embed", "text_embed", "aug1_embed", "aug2_embed"), same)
    batch["logit_scale"] = torch.tensor(10.0)
    assert CLIPLoss()(batch)["loss"].item() == pytest.approx(math.log(n), rel=1e-6)
    assert SIMCLRLoss()(batch)["loss"].item() == pytest.approx(math.log(2 * n - 1), rel=1e-6)


def test_by_hand():
    image = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    batch = {"image_embed": image, "text_embed": image, "logit_scale": torch.tensor(3.0)}
    batch |= {"aug1_embed": image, "aug2_embed": image}
    # Rows are (3, 0): -log(e^3 / (e^3 + 1)); with 1/t = 2 SimCLR adds one zero from the own view.
    assert CLIPLoss()(batch)["loss"].item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert SIMCLRLoss(0.5)(batch)["loss"].item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert CLIPLoss()(batch)["clip_acc"].item() == 100


def test_symmetry_permutation_and_scale():
    batch = outputs(dtype=torch.float64)
    swapped = {**batch, "image_embed": batch["text_embed"], "text_embed": batch["image_embed"]}
    swapped |= {"aug1_embed": batch["aug2_embed"], "aug2_embed": batch["aug1_embed"]}
    order = torch.randperm(12)
    permuted = {k: v[order] if v.ndim else v for k, v in batch.items()}
    longer = {k: 7 * v if v.ndim else v for k, v in batch.items()}
    loss = SLIPLoss(CLIPLoss(), SIMCLRLoss(0.1), 1.0)
    for other in (swapped, permuted, longer):
        assert loss(other)["loss"].item() == pytest.approx(loss(batch)["loss"].item(), rel=1e-12)


def test_logits_are_float32_under_mixed_precision():
    half = {k: v.detach().bfloat16() for k, v in outputs().items()}
    expected = LOSSES["slip_temp0.2_scale0.5"]({k: v.float() for k, v in half.items()})["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        got = LOSSES["slip_temp0.2_scale0.5"](half)["loss"]
    assert got.dtype == torch.float32
    assert got.item() == expected.item()
