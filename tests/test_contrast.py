"""The sigmoid loss, and equal captions or images in a batch: closed forms, the peer, ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import PeakMemory, seeded_embeddings, seeded_ids

import contrast
from losses import CLIPLoss, SigLIPLoss, SIMCLRLoss, SLIPLoss

VIEWS = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")


def outputs(ids=None, rows=None):
    rows = rows or {k: x.double() for k, x in seeded_embeddings().items()}
    rows = {k: x.detach().clone().requires_grad_() for k, x in rows.items()}
    scalars = {"logit_scale": 10.0, "logit_bias": -3.0}
    scalars = {k: torch.tensor(x, dtype=torch.double).requires_grad_() for k, x in scalars.items()}
    return rows | scalars | ({} if ids is None else {"ids": torch.as_tensor(ids)})


def loss_and_gradients(loss, batch):
    metrics = loss(batch)
    metrics["loss"].backward()
    return metrics, {k: x.grad for k, x in batch.items() if x.is_floating_point()}


def assert_alike(got, expected, tolerance=1e-12):
    """(metrics or a loss, gradients) of two losses; a gradient may be absent in both."""
    values = [x["loss"] if isinstance(x, dict) else x for x, _ in (got, expected)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=tolerance)
    assert any(gradient is not None for gradient in expected[1].values())
    for key, gradient in expected[1].items():
        assert (gradient is None) == (got[1][key] is None), key
        if gradient is not None:
            assert torch.allclose(got[1][key], gradient, rtol=tolerance, atol=tolerance), key


def units(batch):
    return [F.normalize(batch[view], dim=-1) for view in VIEWS]


# ---------------------------------------------------------------------------------------------
# The sigmoid loss


def pairwise(batch, positives=None, hidden=None):
    """SigLIP's loss by the whole matrix."""
    image, text, *_ = units(batch)
    n = len(image)
    z = 2.0 * (torch.eye(n, dtype=bool) if positives is None else positives) - 1
    terms = -F.logsigmoid(z * (batch["logit_scale"] * image @ text.T + batch["logit_bias"]))
    return (terms if hidden is None else terms[~hidden]).sum() / n


def test_the_sigmoid_loss_is_open_clips_and_the_pairwise_form():
    from open_clip.loss import SigLipLoss

    def peer(batch):
        image, text, *_ = units(batch)
        loss = SigLipLoss()(image, text, batch["logit_scale"], batch["logit_bias"])
        return {"loss": loss}

    got = loss_and_gradients(SigLIPLoss(), outputs())
    assert_alike(got, loss_and_gradients(peer, outputs()))
    whole = loss_and_gradients(lambda batch: {"loss": pairwise(batch)}, outputs())
    assert_alike(got, whole)
    assert got[0].keys() == {"loss", "clip_loss", "clip_acc"}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_sigmoid_loss_on_two_ranks_is_open_clips(rank, two_ranks):
    """Values of a rank and its own gradients, before DDP's mean over ranks."""
    ours, theirs = (two_ranks[f"rank{rank}"][key] for key in ("sigmoid_full", "sigmoid_open_clip"))
    for key in ("image_embed", "text_embed", "logit_scale", "logit_bias"):
        got, expected = ours["gradients"][key], theirs["gradients"][key]
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12), key
    assert ours["values"]["loss"] == pytest.approx(theirs["values"]["loss"], rel=1e-12)


def test_the_sigmoid_loss_by_hand():
    """Two pairs at right angles: the logits are s + b and b."""
    eye = torch.eye(2, dtype=torch.double)
    batch = outputs(rows=dict.fromkeys(VIEWS, eye))
    expected = math.log(1 + math.exp(-7)) + math.log(1 + math.exp(-3))
    metrics = SigLIPLoss()(batch)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert metrics["clip_acc"].item() == 100


def test_rows_at_a_time_equal_the_whole_matrix_in_linear_memory(monkeypatch):
    def rows(n):
        generator = torch.Generator().manual_seed(0)
        return {k: torch.randn(n, 8, generator=generator, dtype=torch.double) for k in VIEWS}

    n = 2 * contrast.ROWS + 100
    ids = torch.arange(2 * n).view(n, 2) % 700
    same = (ids[:, None] == ids).any(-1)
    loss = loss_and_gradients(SigLIPLoss(duplicates="share"), outputs(ids, rows(n)))
    whole = loss_and_gradients(lambda b: {"loss": pairwise(b, same)}, outputs(rows=rows(n)))
    assert_alike(loss, whole)

    monkeypatch.setattr(contrast, "ROWS", 64)
    slip = SLIPLoss(SigLIPLoss(duplicates="mask"), SIMCLRLoss(duplicates="mask"))

    def peak(n):
        batch = outputs(torch.zeros(n, 2, dtype=torch.long), rows(n))
        with PeakMemory() as memory:
            slip(batch)["loss"].backward()
        return memory.peak

    assert 3 < peak(2048) / peak(512) < 5  # the whole matrix: 16


# ---------------------------------------------------------------------------------------------
# Duplicates

LOSSES = {
    "softmax": lambda duplicates: CLIPLoss(duplicates=duplicates),
    "sigmoid": lambda duplicates: SigLIPLoss(duplicates=duplicates),
    "simclr": lambda duplicates: SIMCLRLoss(duplicates=duplicates),
}


def test_two_equal_captions_by_hand():
    """Three pairs at right angles of which the first two have one caption; e = exp(10)."""
    eye, ids = torch.eye(3, dtype=torch.double), [[5, 1], [5, 2], [6, 3]]
    rows = dict.fromkeys(VIEWS, eye)
    e = math.exp(10)
    all_seen, one_hidden = -math.log(e / (e + 2)), -math.log(e / (e + 1))
    shared = (-math.log(e / (e + 2)) - math.log(1 / (e + 2))) / 2
    expected = {
        "keep": all_seen,
        "mask": (2 * one_hidden + all_seen) / 3,
        "share": (2 * shared + all_seen) / 3,
    }
    for duplicates, value in expected.items():
        metrics = CLIPLoss(duplicates=duplicates)(outputs(ids, rows))
        assert metrics["loss"].item() == pytest.approx(value, rel=1e-9), duplicates
        if duplicates != "keep":
            assert metrics["duplicates"].item() == pytest.approx(200 / 3)

    own, other = math.log(1 + math.exp(-7)), math.log(1 + math.exp(-3))  # -log sigmoid
    expected = {
        "keep": own + 2 * other,
        "mask": (3 * own + 4 * other) / 3,
        "share": (3 * own + 4 * other + 2 * math.log(1 + math.exp(3))) / 3,
    }
    for duplicates, value in expected.items():
        metrics = SigLIPLoss(duplicates=duplicates)(outputs(ids, rows))
        assert metrics["loss"].item() == pytest.approx(value, rel=1e-9), duplicates


def test_equal_images_by_hand():
    """SimCLR at temperature 1: four images at right angles of which the first two are equal."""
    eye = torch.eye(4, dtype=torch.double)
    batch = outputs([[1, 7], [2, 7], [1, 8], [4, 9]], dict.fromkeys(VIEWS, eye))
    e = math.e  # each query sees 7 keys: its other view, 3 others and 3 of its own side
    alone = -math.log(e / (e + 6))
    hidden = -math.log(e / (e + 4))
    shared = -(math.log(e / (e + 6)) + 2 * math.log(1 / (e + 6))) / 3
    for duplicates, twin in {"mask": hidden, "share": shared}.items():
        metrics = SIMCLRLoss(1.0, duplicates)(batch)
        assert metrics["loss"].item() == pytest.approx((twin + alone) / 2, rel=1e-12)
        assert metrics["ssl_duplicates"].item() == 50  # equal captions are none here
        metrics = CLIPLoss(duplicates=duplicates)(batch)
        assert metrics["duplicates"].item() == 75


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("duplicates", ["mask", "share"])
def test_without_duplicates_nothing_changes(name, duplicates):
    ids = torch.arange(24).view(12, 2)
    got = loss_and_gradients(LOSSES[name](duplicates), outputs(ids))
    expected = loss_and_gradients(LOSSES[name]("keep"), outputs())
    if duplicates == "mask":  # to the bit
        assert torch.equal(got[0]["loss"], expected[0]["loss"])
        assert all(x is None or torch.equal(x, expected[1][k]) for k, x in got[1].items())
    assert_alike(got, expected)
    shared = {k: x for k, x in got[0].items() if "duplicates" not in k}
    assert shared.keys() == expected[0].keys() and len(got[0]) == len(shared) + 1
    assert [x.item() for k, x in got[0].items() if "duplicates" in k] == [0]


def test_if_all_captions_are_equal():
    """mask leaves a query its own text alone, share makes all of them right."""
    ids = torch.stack([torch.zeros(12), torch.arange(12)], 1).long()
    metrics, gradients = loss_and_gradients(CLIPLoss(duplicates="mask"), outputs(ids))
    assert metrics["loss"].item() == 0 and metrics["clip_acc"].item() == 100
    assert not gradients["image_embed"].any() and not gradients["logit_scale"].any()
    metrics = CLIPLoss(duplicates="share")(outputs(ids))
    assert metrics["clip_acc"].item() == metrics["duplicates"].item() == 100
    image, text, *_ = units(batch := outputs())
    logits = batch["logit_scale"] * image @ text.T
    even = -(logits.log_softmax(1).mean() + logits.log_softmax(0).mean()) / 2
    assert metrics["loss"].item() == pytest.approx(even.item(), rel=1e-12)
    got = loss_and_gradients(SigLIPLoss(duplicates="mask"), outputs(ids))
    others = ~torch.eye(12, dtype=bool)
    own = loss_and_gradients(lambda b: {"loss": pairwise(b, hidden=others)}, outputs())
    assert_alike(got, own)


def plain(batch, name, duplicates):
    """The losses by whole matrices, with weights of the positives and a mask of the keys."""
    image, text, a, b = units(batch)
    ids, eye = seeded_ids(), torch.eye(12, dtype=bool)
    same = (ids[:, None] == ids).any(-1)
    if name == "sigmoid":
        hidden = same & ~eye if duplicates == "mask" else None
        return pairwise(batch, same if duplicates == "share" else None, hidden)
    if name == "softmax":
        logits, own = batch["logit_scale"] * image @ text.T, eye
        sides = [(logits, own, same), (logits.T, own, same)]
    else:
        both, self_ = torch.cat([a, b]), torch.eye(24, dtype=bool)
        logits = (both @ both.T / 0.1).masked_fill(self_, -1e9)
        own, images = self_.roll(12, 0), ids[:, 1].repeat(2)
        sides = [(logits, own, (images[:, None] == images) & ~self_)]
    total = 0
    for logits, own, same in sides:
        if duplicates == "mask":
            logits = logits.masked_fill(same & ~own, -1e9)
        right = (own if duplicates == "mask" else same).double()
        total = total + F.cross_entropy(logits, right / right.sum(1, keepdim=True))
    return total / len(sides)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("duplicates", ["mask", "share"])
def test_values_and_gradients_equal_those_of_the_whole_matrix(name, duplicates, monkeypatch):
    monkeypatch.setattr(contrast, "ROWS", 5)
    got = loss_and_gradients(LOSSES[name](duplicates), outputs(seeded_ids()))
    whole = loss_and_gradients(lambda b: {"loss": plain(b, name, duplicates)}, outputs())
    assert_alike(got, whole)


@pytest.mark.parametrize("ranks", ["one", "rank0", "rank1"])
@pytest.mark.parametrize("name", ["sigmoid share", "softmax mask", "softmax share"])
def test_exact_accumulation_equals_the_large_batch(name, ranks, two_ranks):
    expected, got = two_ranks["one"]["duplicates"][name, 1], two_ranks[ranks]["duplicates"][name, 2]
    assert ("logit_bias" in got["gradients"]) == name.startswith("sigmoid")
    for key, value in expected["gradients"].items():
        assert torch.allclose(got["gradients"][key], value, rtol=1e-9, atol=1e-12), key
    if ranks == "one":
        assert got["metrics"]["duplicates"] == expected["metrics"]["duplicates"] > 0
        assert got["metrics"]["loss"].item() == pytest.approx(expected["metrics"]["loss"].item())


@pytest.mark.parametrize("rank", ["rank0", "rank1"])
def test_ids_pass_through_ddp(rank, two_ranks):
    expected, got = (two_ranks[key]["ddp"]["gradients"] for key in ("one", rank))
    for key, value in expected.items():
        assert torch.allclose(got[key], value, rtol=1e-9, atol=1e-12), key


def test_if_equal_captions_have_equal_embeddings_keep_and_share_are_one_loss():
    """The keys that are right have one logit, and rows with one query share their targets."""
    ids = torch.stack([seeded_ids()[:, 0], torch.arange(12)], 1)
    rows = {k: x.double() for k, x in seeded_embeddings().items()}
    first = [ids[:, 0].tolist().index(caption) for caption in ids[:, 0].tolist()]
    rows["text_embed"] = rows["text_embed"][first]
    results = []
    for duplicates in ("keep", "share"):
        metrics, gradients = loss_and_gradients(CLIPLoss(duplicates=duplicates), outputs(ids, rows))
        texts = torch.zeros(12, 24, dtype=torch.double)
        texts.index_add_(0, torch.tensor(first), gradients["text_embed"])  # of each caption
        results.append((metrics, gradients | {"text_embed": texts}))
    assert_alike(*results)
