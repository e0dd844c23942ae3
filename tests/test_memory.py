"""benchmark.py memory: fake tensors take as much as real ones, and the largest batch fits."""

import pytest
import torch

import losses
import main
import models
import tests.warm  # noqa: F401
import warmup
from benchmarks import memory

CPU = torch.device("cpu")


def parse(flags):
    small = "--ssl-mlp-dim 32 --ssl-emb-dim 16 --precision fp32"
    return main.get_args_parser().parse_args(f"{small} {flags}".split())


def test_fake_tensors_take_as_much_as_real_ones():
    """Of a tower without attention, whose kernels differ from device to device."""
    args = parse("--model SIMCLR_NANORESNET")
    model = models.create_model(args.model, args.ssl_mlp_dim, args.ssl_emb_dim)
    views = warmup.dummy_batch(model, 4, CPU)
    saved = memory.saved_activations(model, losses.create_loss(model.loss), views)
    parts = memory.measure(args, 4, CPU)
    assert parts["activations"] == memory.size_of(saved) > 0
    assert parts["weights"] == 4 * sum(x.numel() for x in model.parameters()) + sum(
        x.untyped_storage().nbytes() for x in model.buffers()
    )


def test_half_precision_and_recomputation_take_less():
    def activations(flags):
        return memory.measure(parse(f"--model SLIP_NANO8 {flags}"), 64)["activations"]

    assert activations("--precision bf16") < 0.8 * activations("")
    assert activations("--grad-checkpointing") < 0.5 * activations("")


def test_what_is_locked_takes_no_gradient_and_an_average_as_much_as_the_weights():
    plain, locked, averaged = (
        memory.measure(parse(f"--model CLIP_NANO8 {flags}"), 64)
        for flags in ("", "--lock-image", "--ema-decay 0.9")
    )
    image = models.create_model("CLIP_NANO8").visual
    size = 4 * sum(p.numel() for p in image.parameters()) + 4 * 64 * 32  # and the projection
    assert plain["gradients"] - locked["gradients"] == size
    assert plain["moments"] - locked["moments"] == 2 * size
    assert locked["activations"] < 0.6 * plain["activations"]  # the text tower's
    assert averaged["weights"] == 2 * plain["weights"]


@pytest.mark.parametrize("flags", [[], ["--activation-budget", "0.8"]])
def test_a_budget_that_is_ignored_is_said(capsys, flags):
    memory.benchmark_memory(None, ["--model", "SLIP_NANO8", *flags])
    assert ("without --activation-budget, which this ignores" in capsys.readouterr().out) == bool(
        flags
    )


@pytest.mark.parametrize("flags", ["", "--grad-checkpointing"])
def test_the_largest_batch_fits_and_the_next_does_not(flags):
    args, limit = parse(f"--model SLIP_NANO8 {flags}"), 2e9
    batch = memory.largest_batch(args, limit)
    assert batch % 8 == 0 and sum(memory.measure(args, batch).values()) <= limit
    assert sum(memory.measure(args, batch + 16).values()) > limit
    assert memory.largest_batch(args, 1e6) == 0
