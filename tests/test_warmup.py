"""torch.compile: nothing compiles in mid-training, any failure is said and leaves all as it was.

Most tests take a compiler that only traces, as code for the CPU costs seconds a block and shape.
"""

import json
import os
import socket

import pytest
import torch
from helpers import Said, assert_equal, exact_training, step_losses, train, views_of, weights
from test_main_finetune import call as finetune
from test_main_linear import call as probe

import engine
import main
import models
import warmup
from benchmarks.memory import saved_activations, size_of
from infra import compilation
from utils import InputError, get_rng_state

CPU = torch.device("cpu")


@pytest.fixture
def tracing(monkeypatch):
    """A compiler that only traces; whatever compiles after the trial is an error."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "AFTERWARDS", "fail_on_recompile")


def compilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def write_captions(tiny, path):
    """Captions that fill 16, 32, 48, 64 and 77 tokens."""
    captions = json.loads((tiny / "captions.json").read_text())
    for i, annotation in enumerate(captions["annotations"]):
        annotation["caption"] += " and on" * [0, 10, 18, 26, 40][i // 2 % 5]
    path.write_text(json.dumps(captions))
    return path


LENGTHS = {16, 32, 48, 64, 77}
EXACT = ["--accum", "exact", "--update-freq", 2, "--grad-checkpointing", "--precision", "bf16"]


@pytest.mark.parametrize("flags", [[], EXACT])
def test_nothing_compiles_after_the_trial(tiny, tmp_path, tracing, monkeypatch, flags):
    metadata, seen = write_captions(tiny, tmp_path / "captions.json"), []
    forward = models.CLIP.forward_text

    def spy(self, text):
        seen.append(text.shape[1])
        return forward(self, text)

    flags = ["--metadata", metadata, "--batch-size", 1, *flags]
    train(tiny, tmp_path / "eager", *flags, model="CLIP_NANO8", val="none")
    before = compilations()
    monkeypatch.setattr(models.CLIP, "forward_text", spy)
    train(tiny, tmp_path / "compiled", "--compile", *flags, model="CLIP_NANO8")
    assert compilations() >= before + 6  # an image block, a text block of five lengths
    assert set(seen[12:]) >= LENGTHS  # behind the trial, which takes 12 batches at most
    runs = [tmp_path / name for name in ("eager", "compiled")]
    assert step_losses(runs[1]) == pytest.approx(step_losses(runs[0]), rel=1e-5)


def test_a_compiled_run_resumes_at_the_same_bits(tiny, tmp_path, tracing, monkeypatch):
    monkeypatch.setattr(warmup, "LENGTHS", (16,))
    flags = {"val": "none", "model": "CLIP_NANO8"}
    for epochs in (1, 2):
        train(tiny, tmp_path / "parts", "--compile", epochs=epochs, **flags)
    train(tiny, tmp_path / "whole", "--compile", epochs=2, **flags)
    assert weights(tmp_path / "parts")["epoch"] == 2
    for key in ("state_dict", "optimizer"):
        assert_equal(weights(tmp_path / "parts")[key], weights(tmp_path / "whole")[key])


@pytest.mark.parametrize("flags", [[], ["--accum", "exact", "--update-freq", 2]])
def test_the_augmentation_compiles_once_and_before_the_first_update(
    tiny, tmp_path, tracing, monkeypatch, flags
):
    graphs = []

    def compiler(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", compiler)
    flags = ["--augment", "device", *flags]
    for choice in ("--no-compile", "--compile"):
        train(tiny, tmp_path / choice, choice, *flags, model="SIMCLR_NANO8", val="none")
    assert sum(torch.addcmul in targets for targets in graphs) == 1
    runs = [tmp_path / choice for choice in ("--no-compile", "--compile")]
    assert step_losses(runs[1]) == pytest.approx(step_losses(runs[0]), rel=1e-5)


def parse(*flags):
    return main.get_args_parser().parse_args(["--batch-size", "2", *flags])


def start(*flags, k=1, name="SLIP_NANO8"):
    """A small training, and log and reasons of its start."""
    t, log = exact_training(name, k), Said()
    t.model.float()
    main.warm_up(t.model, t, log, parse("--compile", *flags))
    return t, log.lines


def fails_if(condition):
    def compiler(graph, inputs):
        if condition(graph, [x for x in inputs if isinstance(x, torch.Tensor)]):
            raise RuntimeError("no such kernel\nand much more")
        return graph.forward

    return compiler


def is_loss(graph, inputs):
    return any("cross_entropy" in str(node.target) for node in graph.graph.nodes)


def is_short(graph, inputs):
    return any(x.shape[:2] == (2, 16) and x.ndim == 3 for x in inputs)


def is_without_gradient(graph, inputs):
    return not torch.is_grad_enabled()


@pytest.mark.parametrize("condition, k", [(is_loss, 1), (is_short, 1), (is_without_gradient, 2)])
def test_a_compiler_that_fails_is_said_and_training_goes_on(monkeypatch, condition, k):
    """At the loss, at the last length, and in the first pass of exact accumulation."""
    monkeypatch.setattr(compilation, "BACKEND", fails_if(condition))
    t, lines = start(k=k)
    assert lines == [
        "warning: torch.compile failed, training continues without it on all ranks: "
        "rank 0: RuntimeError: no such kernel"
    ]
    other, (views,) = exact_training("SLIP_NANO8", k), views_of(t.model, 2, 1)
    other.model.float()
    views = {key: x if key == "text" else x.float() for key, x in views.items()}
    for training in (t, other):
        engine.update(training, [views] * k, 0)
    assert_equal(dict(t.model.state_dict()), dict(other.model.state_dict()))


def test_a_trial_that_fails_on_one_rank_fails_on_all(two_ranks):
    told = ["rank 1: RuntimeError: no such kernel"]
    for rank in ("rank0", "rank1"):
        assert two_ranks[rank]["compiled"]["fails"] == told


def test_ranks_train_compiled_as_they_do_uncompiled(two_ranks):
    """In float64; anything that would compile within DDP is an error there."""
    assert two_ranks["rank0"]["compiled"]["reasons"] == []
    for rank in ("rank0", "rank1"):
        expected = two_ranks[rank]["plain"]["SLIP_NANO8", 2]["gradients"]
        for key, gradient in two_ranks[rank]["compiled"]["gradients"].items():
            assert torch.allclose(gradient, expected[key], rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("k", [1, 2])
def test_the_trial_leaves_no_trace(tracing, monkeypatch, k):
    monkeypatch.setattr(warmup, "LENGTHS", ())
    t = exact_training("SLIP_NANORESNET", k)
    before = {key: x.clone() for key, x in t.model.state_dict().items()}
    random, optimizer = get_rng_state(), t.optimizer.state_dict()
    views = warmup.dummy_batches(t.model, 2, CPU)
    views = [{k: x if k == "text" else x.double() + x.numel() for k, x in v.items()} for v in views]
    assert warmup.try_compilation(t, t.model.transformer.resblocks, views) == []
    assert_equal(dict(t.model.state_dict()), before)
    assert_equal(get_rng_state(), random)
    assert_equal(t.optimizer.state_dict(), optimizer)
    assert all(p.grad is None for p in t.model.parameters())


def test_probe_and_fine_tuning_compile_as_well(probed, tmp_path, tracing, monkeypatch):
    """With stochastic depth, in another share at each block."""
    for call, more in ((probe, []), (finetune, ["--drop-path", 0.5])):
        before = compilations()
        for choice in ("--no-compile", "--compile"):
            call(probed, tmp_path / call.__module__ / choice, *more, "--epochs", 1, choice)
        assert compilations() > before
        runs = [tmp_path / call.__module__ / c for c in ("--no-compile", "--compile")]
        logs = [next(run.glob("*-digits")) for run in runs]
        assert step_losses(logs[1]) == pytest.approx(step_losses(logs[0]), rel=1e-5)


def test_a_budget_keeps_fewer_activations_and_the_same_gradient(monkeypatch):
    """By a compiler that divides work between forward and backward as on CUDA, without kernels."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager_decomp_partition")
    monkeypatch.setattr(warmup, "LENGTHS", ())
    kept, gradients = [], []
    for flags in ([], ["--activation-budget", "0.5"]):
        torch._dynamo.reset()
        t, lines = start(*flags, name="CLIP_NANO8")
        assert lines == []
        views = warmup.dummy_batch(t.model, 2, CPU)
        views["image"] += torch.linspace(0, 1, 32)
        kept.append(size_of(saved_activations(t.model, t.criterion, views)))
        t.criterion(t.model(**views))["loss"].backward()
        gradients.append([p.grad for p in t.model.parameters()])
    assert kept[1] < 0.8 * kept[0]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("script", ["main", "main_linear", "main_finetune"])
def test_a_budget_without_compilation_is_refused(script, tiny, probed, tmp_path):
    call = {"main_linear": probe, "main_finetune": finetune}.get(script)
    with pytest.raises(InputError, match=r"activation budget 0.8: .* compile, or omit it"):
        if call:
            call(probed, tmp_path, "--activation-budget", 0.8)
        else:
            train(tiny, tmp_path, "--activation-budget", 0.8)


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    """Also those of a launcher that gives each rank cores of its own."""
    host, others = socket.gethostname(), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(compilation, "all_gather_object", lambda own: own + others)
    assert compilation.own_cores() == 8
    others += [(host, set(range(8))), ("elsewhere", set(range(8))), (host, set(range(8, 16)))]
    assert compilation.own_cores() == 4
    others += [(host, set(range(8)))] * 20
    assert compilation.own_cores() == 1
