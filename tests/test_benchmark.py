"""benchmark.py on tiny models: both ways to train are the same training, and figures add up."""

import argparse
import json
import re

import pytest
import torch
from helpers import train_flags
from launch import forking

import benchmark
import benchmark_data
import engine
from infra import distributed
from utils import InputError


def measured(tiny, command="step", is_paper=False, *flags):
    options = argparse.Namespace(command=command, caption_tokens=77)
    flags = [*train_flags(tiny, "out", *flags), "--dataset", "coco"]
    return benchmark.MeasuredTraining(options, flags, is_paper)


def test_the_archived_way_is_the_same_training(tiny, unlimited):
    here, paper = measured(tiny), measured(tiny, "step", True)
    assert here.gflop == pytest.approx(paper.gflop, rel=0.02)  # the mask is no matrix product
    batch = next(here.batches)
    losses = [
        [engine.update(m.training, [dict(batch)], step)["loss"].item() for step in range(3)]
        for m in (here, paper)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("command, is_paper", [("step", False), ("train", False), ("train", True)])
@pytest.mark.parametrize("flags", [[], ["--update-freq", 2, "--accum", "exact"]])
def test_phases_add_up_to_the_time(tiny, command, is_paper, flags, unlimited):
    run = measured(tiny, command, is_paper, *flags)
    run.round(1)
    result = run.round(2)
    assert set(result) == {*benchmark.PHASES, "samples/s"} and min(result.values()) > 0
    samples = run.args.batch_size * run.args.update_freq
    seconds = sum(result[phase] for phase in benchmark.PHASES)
    assert seconds == pytest.approx(samples / result["samples/s"], rel=0.1)
    assert (
        distributed.get_world_size() == 1
        and torch.isfinite(next(run.training.model.parameters())).all()
    )


@pytest.fixture
def unlimited(monkeypatch):
    """What the machine could do is not measured."""
    monkeypatch.setattr(benchmark, "matrix_rate", lambda precision: 1.0)
    monkeypatch.setattr(benchmark, "copy_rate", lambda device: 1.0)


@pytest.fixture
def quick(monkeypatch):
    """The processes that are measured are forked from one that has imported all."""
    monkeypatch.setattr(benchmark, "get_context", lambda method: forking())


def test_both_ways_are_compared_and_figures_are_written(quick, tmp_path, capsys):
    flags = "step --model SLIP_NANO8 --batch-size 8 --device cpu --ssl-mlp-dim 32 --paper "
    flags += "--updates 1 --rounds 1 --default-malloc --save"
    benchmark.main([*flags.split(), str(tmp_path / "figures")])
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "figures/step.json").read_text())
    results = saved["results"]
    assert set(results) == {"this code", "--paper"}
    for row in results.values():
        rate = row["samples/s"] * row["gflop"] / 1e3
        assert row["TFLOP/s"] == pytest.approx(rate)
        assert row["percent of matrices"] == pytest.approx(100 * rate / row["matrices"])
        assert row["copy"] > 0 and row["GB"] > 0
        assert f"{row['samples/s']:10.2f}" in out
    assert (tmp_path / "figures/step.png").read_bytes().startswith(b"\x89PNG")


def test_classifiers_are_compared(capsys):
    flags = "classifier --model CLIP_NANO8 --classes 5 --sample 2 --rounds 2"
    benchmark.main(flags.split())
    out = capsys.readouterr().out
    assert "5 classes x 7 prompts" in out and "one at a time 2 of them" in out
    rates = re.findall(r"(one class at a time|this code) +([\d.]+) classes/s +([\d.]+) x", out)
    (first, slow, one), (second, fast, ratio) = rates
    assert (first, second, one) == ("one class at a time", "this code", "1.00")
    assert float(ratio) == pytest.approx(float(fast) / float(slow), rel=0.02)


def test_slow_rates_have_decimals(capsys):
    benchmark_data.print_rates({"slow": 0.321, "fast": 1234.5}, "slow", "classes/s")
    assert capsys.readouterr().out.split()[1::5] == ["0.32", "1234"]


def test_classifiers_on_features_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_data, "in_process", benchmark_data.with_memory)  # quicker
    flags = "features --images 300 --width 4 --classes 3 --queries 5 --iterations 2 --folder"
    benchmark.main([*flags.split(), str(tmp_path)])
    out = capsys.readouterr().out
    assert "features: 300 x 4, 3 classes" in out
    for line in ("k-NN +[0-9.]+ s for 5 queries", "logistic regression +[0-9.]+ s for 2 iter"):
        assert re.search(f"{line}.*at most [0-9.]+ GB of memory", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, match",
    [
        (["step", "--model", "SLIP_X"], "unknown model 'SLIP_X'"),
        (["step", "--batch", "8"], "unknown flags? .*--batch|unrecognized arguments: --batch"),
        (["data", "--model", "x"], "unknown flags --model x"),
    ],
)
def test_wrong_flags_are_told(quick, flags, match):
    with pytest.raises(InputError, match=match):
        benchmark.main(flags)
