"""Exact accumulation: gradients of micro-batches, on ranks, equal those of the one large batch."""

import pytest
import timm
import torch
from helpers import PeakMemory, exact_training, views_of
from launch import run_script

import engine
import main
import make_dataset
from infra import logger
from towers import TINY_VIT

METHODS = ("CLIP_NANO8", "SIMCLR_NANO8", "SLIP_NANO8")


@pytest.mark.parametrize("ranks", ["one", "rank0", "rank1"])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_equal_those_of_the_large_batch(name, k, ranks, two_ranks):
    expected, got = two_ranks["one"]["exact"][name, 1], two_ranks[ranks]["exact"][name, k]
    assert got["gradients"].keys() == expected["gradients"].keys()
    for key, value in expected["gradients"].items():
        # atol: biases before a batch norm have no effect, their gradient is rounding alone.
        assert torch.allclose(got["gradients"][key], value, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("name", METHODS)
def test_losses_and_statistics_equal_those_of_the_large_batch(name, k, two_ranks):
    expected, one = two_ranks["one"]["exact"][name, 1], two_ranks["one"]["exact"][name, k]
    ranks = [two_ranks[rank]["exact"][name, k] for rank in ("rank0", "rank1")]
    for key, value in expected["metrics"].items():
        assert one["metrics"][key].item() == pytest.approx(value.item(), rel=1e-12), key
        mean = sum(rank["metrics"][key].item() for rank in ranks) / 2
        assert mean == pytest.approx(value.item(), rel=1e-12), key
    for key, value in expected["buffers"].items():
        for run in (one, *ranks):
            assert torch.allclose(run["buffers"][key], value, rtol=1e-12), key


def test_plain_accumulation_is_another_gradient(two_ranks):
    exact, plain = (
        two_ranks["one"][kind]["SLIP_NANO8", 2]["gradients"]["image_projection"]
        for kind in ("exact", "plain")
    )
    assert (exact - plain).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("exact", [False, True])
def test_ranks_that_built_other_weights_train_those_of_rank_0(exact, two_ranks):
    kind = "exact" if exact else "plain"
    for rank in ("rank0", "rank1"):
        got = two_ranks[rank]["other_weights"][exact]["gradients"]
        for key, value in two_ranks["rank0"][kind]["SLIP_NANO8", 2]["gradients"].items():
            assert torch.allclose(got[key], value, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_summed_in_bf16_are_rounded_and_equal_on_all_ranks(exact, two_ranks):
    kind = "exact" if exact else "plain"
    ranks = [two_ranks[rank]["bf16"][exact]["gradients"] for rank in ("rank0", "rank1")]
    for key, gradient in ranks[0].items():
        assert torch.equal(gradient, ranks[1][key]), key
        assert torch.equal(gradient, gradient.bfloat16().double()), key
    weight = "image_projection"
    expected = two_ranks["rank0"][kind]["SLIP_NANO8", 2]["gradients"][weight]
    error = (ranks[0][weight] - expected).norm() / expected.norm()
    assert 0 < error < 2**-7


@pytest.mark.parametrize("option", ["drop_path_rate", "patch_drop_rate"])
def test_towers_see_the_same_random_state_twice(option):
    t = exact_training("SLIP_VITTINY8", 3)
    torch.manual_seed(0)
    t.model.visual = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **{option: 0.5}, **TINY_VIT
    ).double()
    t.model.train()
    towers, seen = t.model.forward_features, []

    def spy(**views):
        seen.append(towers(**views))
        return seen[-1]

    t.model.forward_features = spy
    batches = views_of(t.model, 12, 3)
    engine.update(t, batches, 0)
    assert len(seen) == 6 and not seen[0]["image"].requires_grad and seen[3]["image"].requires_grad
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(first[view], second[view]) for view in first)
    drawn = towers(**batches[0])["image"]
    assert not torch.equal(drawn, towers(**batches[0])["image"])  # there is something random


def test_batch_norm_inside_a_tower_counts_each_batch_once():
    t = exact_training("SIMCLR_test_resnet", 2)
    engine.update(t, views_of(t.model, 8, 2), 0)
    counts = {k: int(v) for k, v in t.model.named_buffers() if "num_batches_tracked" in k}
    towers = {v for k, v in counts.items() if k.startswith("visual")}
    heads = {v for k, v in counts.items() if k.startswith("image_mlp")}
    assert towers == {4} and heads == {2}  # two views: of two micro-batches, of the whole batch


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    def peak(k, exact):
        t = exact_training("SLIP_NANO8", k)
        t.exact, t.update_freq = exact, k if exact else 1
        batches = views_of(t.model, 16 * k, t.update_freq)
        with PeakMemory() as memory:
            engine.update(t, batches, 0)
        return memory.peak

    assert peak(8, exact=True) < 1.15 * peak(2, exact=True)
    assert peak(8, exact=False) > 2.5 * peak(2, exact=False)  # in one piece it does


def epoch_of_digits(digits, folder, *flags, ranks=1):
    """The row in the log of an epoch of two updates of 128."""
    command = f"--dataset coco --root {digits} --output-dir {folder} --device cpu "
    command += f"--metadata {digits}/annotations/captions_train2017.json --val-dataset none "
    command += "--model SLIP_VITTINY8 --epochs 1 --warmup-epochs 0 --lr 1e-3 "
    command += "--ssl-mlp-dim 64 --ssl-emb-dim 32 --workers 0 --print-freq 1"
    flags = [*command.split(), *flags]
    if ranks == 1:
        main.main(main.get_args_parser().parse_args(flags))
    else:
        run = run_script("main.py", flags, ranks)
        assert run.returncode == 0, run.stderr
    return logger.read_log(folder / "log.txt")[0]


def test_digits_in_one_piece_and_in_8_are_trained_alike(tmp_path, capsys):
    from sklearn.datasets import load_digits

    digits = tmp_path / "digits"
    make_dataset.save_captioned(load_digits(), range(256), str(digits))

    exact = ["--batch-size", "16", "--accum", "exact", "--update-freq"]
    whole = epoch_of_digits(digits, tmp_path / "1", "--batch-size", "128")
    parts = epoch_of_digits(digits, tmp_path / "8", *exact, "8")
    ranks = epoch_of_digits(digits, tmp_path / "2", *exact, "4", ranks=2)
    said = capsys.readouterr().out
    assert "note:" not in said and "few for the batch statistics" not in said
    for row in (parts, ranks):
        assert row["pairs"] == whole["pairs"] == 256
        for key in ("train_loss", "train_clip_loss", "train_ssl_loss"):
            assert row[key] == pytest.approx(whole[key], abs=1e-4), key
