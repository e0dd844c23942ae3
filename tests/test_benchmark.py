"""benchmark.py on tiny models: both ways to train are the same training, and figures add up."""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from helpers import train_flags
from launch import forking, run_script

import benchmark
import captions
import engine
from benchmarks import archived, augmentation, data, limits, logistic, training
from infra import distributed
from tokenizer import SimpleTokenizer
from utils import InputError


def run_benchmark(flags):
    benchmark.main(*benchmark.get_args_parser().parse_known_args(flags))


def measured(tiny, *flags, from_files=False, is_archived=False):
    flags = [*train_flags(tiny, "out", *flags), "--dataset", "coco"]
    variant = training.Variant(flags, from_files, is_archived=is_archived)
    return training.MeasuredTraining(variant)


def test_the_archived_way_is_the_same_training(tiny, unlimited):
    here, paper = measured(tiny), measured(tiny, is_archived=True)
    assert here.gflop == pytest.approx(paper.gflop, rel=0.02)  # the mask is no matrix product
    batch = next(here.batches)
    losses = [
        [engine.update(m.training, [dict(batch)], step)["loss"].item() for step in range(3)]
        for m in (here, paper)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_archived_way_knows_no_newer_loss(tiny, unlimited):
    with pytest.raises(InputError, match="archived code has no .*; omit --paper"):
        measured(tiny, "--duplicates", "mask", is_archived=True)


def test_the_archived_way_replaces_each_faster_part(tiny, unlimited, monkeypatch):
    names = ("masked_attention", "separate_towers", "whole_contrast")
    parts = {name: Mock(wraps=getattr(archived, name)) for name in names}
    for name, part in parts.items():
        monkeypatch.setattr(archived, name, part)
    measured(tiny).round(1)
    assert not any(part.called for part in parts.values())
    measured(tiny, is_archived=True).round(1)
    assert all(part.called for part in parts.values())


EXACT = ["--update-freq", 2, "--accum", "exact"]
IDS = ["--duplicates", "mask"]


@pytest.mark.parametrize(
    "flags, from_files, is_archived",
    [
        ([], False, False),
        ([], True, False),
        ([], True, True),
        (EXACT + IDS, False, False),
        (EXACT + IDS, True, False),
        (EXACT, True, True),
    ],
)
def test_phases_add_up_to_the_time(tiny, flags, from_files, is_archived, unlimited):
    run = measured(tiny, *flags, from_files=from_files, is_archived=is_archived)
    run.round(1)
    result = run.round(2)
    assert set(result) == {*training.PHASES, "samples/s"} and min(result.values()) > 0
    samples = run.args.batch_size * run.args.update_freq
    seconds = sum(result[phase] for phase in training.PHASES)
    assert seconds == pytest.approx(samples / result["samples/s"], rel=0.1)
    assert (
        distributed.get_world_size() == 1
        and torch.isfinite(next(run.training.model.parameters())).all()
    )


def test_a_round_on_a_gpu_leaves_its_memory_to_the_other_variants(tiny, unlimited, monkeypatch):
    """And begins with an update that is not measured, but allocates."""
    monkeypatch.setattr(distributed, "init_distributed", lambda *flags: CUDA)
    with fake_cuda() as device:
        run, made = measured(tiny, "--no-compile"), Mock(wraps=engine.update)
        monkeypatch.setattr(engine, "update", made)
        freed = Mock()
        monkeypatch.setattr(torch.cuda, "empty_cache", freed)
        run.round(2)
        assert (made.call_count, freed.call_count) == (3, 1)
        assert all(p.grad is None for p in run.model.parameters())
        with device.no_wait():
            run.update()


def test_the_archived_loader_shuffles_whole_batches(tiny):
    pairs = captions.load_captions("coco", tiny / "captions.json")
    views = ("image", "text", "aug1", "aug2")
    dataset = archived.ArchivedDataset(pairs, Path(tiny), views, SimpleTokenizer(), 32)
    (batch, *_) = archived.ArchivedLoader(dataset, 5, 0, data.CPU).start(0)
    images = dict.fromkeys(("image", "aug1", "aug2"), (5, 3, 32, 32))
    assert {view: tuple(x.shape) for view, x in batch.items()} == {**images, "text": (5, 77)}

    loader = archived.ArchivedLoader(range(16), 5, 0, data.CPU)
    one, two, again = ([batch.tolist() for batch in loader.start(epoch)] for epoch in (0, 1, 0))
    assert one == again and one != two and list(map(len, one)) == [5, 5, 5]
    assert len({*chain(*one)}) == 15


@pytest.fixture
def unlimited(monkeypatch):
    """Skips the measurement of the machine's limits."""
    rates = {"matrices": 1.0, "sustained": 0.5}
    monkeypatch.setattr(training, "matrix_rates", lambda precision: rates)
    monkeypatch.setattr(training, "copy_rate", lambda device: 1.0)


def shrink_limits():
    """In a measured process: the machine's limits, of less work."""
    limits.SUSTAINED, limits.SIDE["cpu"], limits.BYTES["cpu"] = 0.01, 128, 2**20


@pytest.fixture
def quick(monkeypatch):
    """Forks the measured processes from one that has imported everything."""

    def pool(number, context):
        return ProcessPoolExecutor(number, forking(), initializer=shrink_limits)

    monkeypatch.setattr(training, "ProcessPoolExecutor", pool)


def test_both_ways_are_compared_and_figures_are_written(quick, tmp_path, capsys):
    flags = "step --model SLIP_NANO8 --batch-size 8 --device cpu --ssl-mlp-dim 32 --paper "
    flags += "--updates 1 --rounds 1 --default-malloc --save"
    run_benchmark([*flags.split(), str(tmp_path / "figures")])
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "figures/step.json").read_text())
    results = saved["results"]
    assert set(results) == {"this code", "--paper"}
    for row in results.values():
        rate = row["samples/s"] * row["gflop"] / 1e3
        assert row["TFLOP/s"] == pytest.approx(rate)
        for limit in ("matrices", "sustained"):
            assert row[f"percent of {limit}"] == pytest.approx(100 * rate / row[limit])
            assert f"{row[limit]:.3f}" in out
        assert row["copy"] > 0 and row["GB"] > 0
        assert f"{row['samples/s']:10.2f}" in out
    assert (tmp_path / "figures/step.png").read_bytes().startswith(b"\x89PNG")


def test_classifiers_are_compared(capsys):
    run_benchmark("classifier --model CLIP_NANO8 --classes 5 --sample 2 --rounds 2".split())
    out = capsys.readouterr().out
    assert "5 classes x 7 prompts" in out and "one at a time 2 of them" in out
    rates = re.findall(r"(one class at a time|this code) +([\d.]+) classes/s +([\d.]+) x", out)
    (first, slow, one), (second, fast, ratio) = rates
    assert (first, second, one) == ("one class at a time", "this code", "1.00")
    assert float(ratio) == pytest.approx(float(fast) / float(slow), rel=0.02)


def test_handing_over_is_measured(tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "BATCH", 4)
    monkeypatch.setattr(data, "SIZE", 32)
    pairs = captions.load_captions("coco", tiny / "captions.json")
    data.compare_hand_over(pairs, str(tiny), Mock(rounds=1))
    lines = re.findall(
        r"--augment (\w+) +(-?[\d.]+) ms, (-?[\d.]+)% of the ([\d.]+) ms", capsys.readouterr().out
    )
    assert [augment for augment, *_ in lines] == ["cpu", "device"]
    for _, handed, percent, made in lines:
        assert float(percent) == pytest.approx(100 * float(handed) / float(made), rel=0.1, abs=1)


def test_kernels_and_their_bytes_are_counted():
    images = torch.ones(2, 3, 4)
    with augmentation.KernelCounter() as counter:
        images.unbind(1)[0].unsqueeze(1)
        assert counter.kernels == 0
        images[:, :1].add_(1)  # reads and writes 8 numbers
        assert (counter.kernels, counter.bytes) == (1, 2 * 4 * 8)
        torch.minimum(images, images[:1])  # reads 24 and 12 numbers, writes 24
        assert (counter.kernels, counter.bytes) == (2, 4 * (2 * 8 + 24 + 12 + 24))


def test_slow_rates_have_decimals(capsys):
    data.print_rates({"slow": 0.321, "fast": 1234.5}, "slow", "classes/s")
    assert capsys.readouterr().out.split()[1::5] == ["0.32", "1234"]


def test_classifiers_on_features_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "in_process", data.with_memory)  # quicker
    flags = "features --images 300 --width 4 --classes 3 --queries 5 --iterations 2 --folder"
    run_benchmark([*flags.split(), str(tmp_path)])
    out = capsys.readouterr().out
    assert "features: 300 x 4, 3 classes" in out
    for line in ("k-NN +[0-9.]+ s for 5 queries", "logistic regression +[0-9.]+ s for 2 iter"):
        assert re.search(f"{line}.*at most [0-9.]+ GB of memory", out)
    assert not list(tmp_path.iterdir())


def test_logistic_regression_is_compared(monkeypatch, capsys):
    monkeypatch.setattr(logistic, "PAUSE", 0)
    run_benchmark("logistic --images 300 --width 8 --classes 3 --rounds 1 --c 0.1 1".split())
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:2] for line in lines] == [
        ["tower", "0.1"], ["tower", "1"], ["even", "0.1"], ["even", "1"],
    ]  # fmt: skip
    for line in lines:
        theirs, ours = map(float, re.findall(r"([-+.e0-9]+) off", line))
        assert abs(ours) < 1e-5 and ours <= theirs + 1e-6


@pytest.mark.parametrize(
    "flags, match",
    [
        (["step", "--model", "SLIP_X"], "unknown model 'SLIP_X'"),
        (["step", "--batch", "8"], "unknown flags? .*--batch|unrecognized arguments: --batch"),
        (["data", "--model", "x"], "unknown flags --model x"),
    ],
)
def test_wrong_flags_stop_in_one_line(quick, flags, match):
    with pytest.raises(InputError, match=match):
        run_benchmark(flags)


def test_ranks_that_agree_are_two_or_more():
    run = run_script("benchmark.py", "agreement --micro-batches 16 --rounds 1".split(), 2)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^ ?\d+ agreements an update, .* [1-9]\d* mic", run.stdout, re.M)) == 4
    with pytest.raises(InputError, match="one rank has nobody to agree with; start by torchrun"):
        run_benchmark(["agreement"])
