"""What a run's folder holds and refuses; that it goes on exactly is in test_resume.py."""

import argparse
import errno
import json
import os
import signal
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import Said, train, train_flags, weights
from launch import run_script, start

import engine
import main
import utils
from infra import checkpoint, checkpoint_manager
from infra.devices import Precision
from infra.run import Run
from infra.signals import NOTHING, SAVE, Stopped
from utils import InputError

SMALL = {"val": "none", "model": "SIMCLR_NANO8"}


@pytest.fixture
def kept(tmp_path):
    """The run of a small model, its checkpoints, the model, and the lines of its log."""
    model = torch.nn.Linear(3, 2)
    training = engine.Training(
        model=model,
        criterion=None,
        optimizer=torch.optim.AdamW(model.parameters()),
        schedule=np.zeros(4),
        precision=Precision("fp32", utils.CPU),
    )
    flags = {"epochs": 2, "batch_size": 1, "seed": 0, "keep_last": 2, "save_every_minutes": 0.0}
    flags["report_to"] = []
    with Run(tmp_path, training, argparse.Namespace(**flags), {"state_dict": model}) as run:
        run.start()
        run.log = Said()
        yield run, run.checkpoints, model


def test_a_checkpoint_holds_all_and_is_plain_data(tiny, tmp_path):
    train(tiny, tmp_path, "--workers", 2, epochs=1)
    state = weights(tmp_path)  # torch.load(weights_only=True)
    assert {"state_dict", "optimizer", "scaler", "epoch", "best_acc1", "progress"} <= state.keys()
    assert {"random", "args", "argv", "git", "versions", "world_size"} <= state.keys()
    assert {"step", "updates", "samples", "bad", "skipped", "meters"} <= state["progress"].keys()
    assert state["progress"]["samples"] == 16 and state["args"]["model"] == "SLIP_NANO8"
    assert set(state["random"][0]) == {"python", "numpy", "torch"} and len(state["random"]) == 1
    assert state["versions"]["torch"] == torch.__version__
    json.dumps(state["args"])


def test_copies_take_the_memory_of_those_before():
    state = {"a": torch.ones(3), "b": [torch.zeros(2), {"c": 1}], "d": (1, "x")}
    copy = checkpoint_manager.copy_to_host(state)
    state["a"] += 1
    assert copy["a"].tolist() == [1, 1, 1] and copy["b"][1] == {"c": 1} and copy["d"] == (1, "x")
    again = checkpoint_manager.copy_to_host(state, copy)
    assert again["a"].data_ptr() == copy["a"].data_ptr() and again["a"].tolist() == [2, 2, 2]
    assert checkpoint_manager.copy_to_host({"a": torch.ones(4)}, copy)["a"].tolist() == [1] * 4


def test_never_two_writers(kept, monkeypatch):
    """A save that is due while another is written waits; the clock's does not even ask."""
    run, k, model = kept
    k.seconds, going, write = 1e-9, threading.Event(), k.write
    monkeypatch.setattr(k, "write", lambda *args: (going.wait(10), write(*args)))
    k.save()
    run.signals.hold()
    run.fetch(lambda: None)
    assert run.due() == NOTHING
    threads = threading.active_count()
    threading.Timer(0.2, going.set).start()
    model.weight.data.fill_(2)
    k.save()
    k.wait()
    assert threading.active_count() <= threads
    assert checkpoint.load(k.latest)["state_dict"]["weight"][0, 0] == 2


@pytest.mark.parametrize(
    "wish, keep_last, readings", [(SAVE, 2, 1), (signal.SIGTERM, 2, 0), (signal.SIGTERM, 1, 1)]
)
def test_a_save_at_a_signal_is_not_read_again(kept, monkeypatch, wish, keep_last, readings):
    """Launchers kill soon after it. But a file that stands alone is read."""
    run, k, _ = kept
    k.keep_last, read, verify = keep_last, [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: (read.append(path), verify(path)))
    run.signals.hold()
    run.signals.signum = wish
    run.fetch(lambda: None)
    with pytest.raises(Stopped) if wish != SAVE else nullcontext():
        run.obey()
    k.wait()
    assert len(read) == readings and checkpoint.load(k.latest)


def test_a_state_that_is_not_finite_replaces_no_checkpoint(kept):
    run, k, model = kept
    k.save()
    k.wait()
    model.weight.data[0, 0] = torch.nan
    k.save()
    k.wait()
    assert run.log.lines == [
        "warning: the checkpoint could not be saved (weight is not finite); training continues, "
        "the one before it is whole"
    ]
    assert checkpoint.load(k.latest)["state_dict"]["weight"].isfinite().all()


def test_the_last_checkpoint_is_tried_again(kept, monkeypatch):
    """Also a best one that failed: no later save makes up for it."""
    run, k, _ = kept
    monkeypatch.setattr(checkpoint_manager, "RETRIES", (0.0, 0.0))
    failures, save = [1, 1], checkpoint.save

    def fail(*args):
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoint, "save", fail)
    k.save(is_best=True)
    k.finish()
    assert run.log.lines == [
        "warning: the checkpoint could not be saved (No space left on device); training continues, "
        "none has been saved yet",
        "the last checkpoint is saved after all",
    ]
    failures += [1] * 4
    k.save(is_best=True)
    with pytest.raises(
        InputError, match=r"could not be saved .* \(No space .* before it is whole;"
    ):
        k.finish()
    failures.append(1)
    k.state.updates, k.state.best_acc1 = 3, 50.0
    k.save(is_best=True)
    k.wait()
    k.state.updates = 4
    k.save()
    k.finish()
    assert checkpoint.load(k.best)["progress"]["updates"] == 3
    assert checkpoint.load(k.latest)["progress"]["updates"] == 4


def test_the_best_is_written_before_the_latest_speaks_of_it(kept, monkeypatch):
    _, k, _ = kept
    k.save()
    k.wait()
    order, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(os.path.basename(b)), replace(a, b))
    )
    k.state.updates, k.state.best_acc1 = 5, 50.0
    k.save(is_best=True)
    k.wait()
    assert order == ["checkpoint_best.pt", "checkpoint-00000000.pt", "checkpoint.pt"]
    best = k.latest.replace("checkpoint.pt", "checkpoint_best.pt")
    assert checkpoint.load(best)["best_acc1"] == 50.0


def test_where_there_are_no_hard_links_files_are_moved(kept, monkeypatch):
    _, k, _ = kept

    def refuse(*args):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for updates in (1, 2):
        k.state.updates = updates
        k.save()
        k.wait()
    assert [os.path.basename(path) for path in k.older()] == ["checkpoint-00000001.pt"]
    assert checkpoint.load(k.latest)["progress"]["updates"] == 2


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "LOCK_PATIENCE", 0.5)
    flags = train_flags(tiny, tmp_path / "run", epochs=1000, **SMALL)
    (running,) = start("main.py", flags, tmp_path / "log")
    try:
        assert running.says("epoch 0 [4/4]")
        with pytest.raises(InputError, match=rf"another run writes there \(process {running.pid}"):
            train(tiny, tmp_path / "run", **SMALL)
    finally:
        running.kill()
    train(tiny, tmp_path / "run", **SMALL)  # the lock went with its process


def test_flags_that_changed_are_told_when_a_run_resumes(tiny, tmp_path, capsys):
    train(tiny, tmp_path, **SMALL)
    again = ["--workers", 1, "--betas", 0.9, 0.98, "--keep-last", 3]
    train(tiny, tmp_path, *again, **SMALL)
    assert "other flags" not in capsys.readouterr().out
    train(tiny, tmp_path, "--lr", 0.01, "--seed", 3, "--batch-size", 8, **SMALL, epochs=2)
    assert (
        "note: it was trained with other flags, those given now apply: --epochs 2 (was 1), "
        "--lr 0.01 (was 0.001), --batch-size 8 (was 4), --seed 3 (was 0)\n"
    ) in capsys.readouterr().out
    # Older runs gave one text to what takes several now.
    state = {"args": argparse.Namespace(val_dataset="imagenet", wd=0.1)}
    now = {"args": {"val_dataset": ["imagenet"], "wd": 0.1}}
    assert not checkpoint.describe_changes(state, now)
    (note,) = checkpoint.describe_changes(
        state, {"args": {"val_dataset": ["imagenet", "dtd"], "wd": 0.1}}
    )
    assert note.endswith("--val-dataset ['imagenet', 'dtd'] (was ['imagenet'])")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"progress": {"step": "x", "meters": {}}}, "its progress is of another kind"),
        ({"progress": {"step": -1, "meters": {}}}, "its progress is of another kind"),
        ({"progress": {"stop": 1, "meters": {}}}, "its progress is of another kind"),
        ({"progress": [1]}, "its progress is of another kind"),
        ({"random": [{"python": 1}]}, "its random states are of another kind"),
        ({"random": 3}, "its random states are of another kind"),
        ({"scaler": {"scale": "x"}}, "its scaler is of another kind"),
        ({"optimizer": {}}, "its optimizer is of another model"),
    ],
)
def test_foreign_fields_are_told(tiny, tmp_path, change, match):
    train(tiny, tmp_path, **SMALL)
    torch.save({**weights(tmp_path), **change}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=match):
        train(tiny, tmp_path, "--precision", "fp16", **SMALL, epochs=2)


def test_deterministic_is_set_before_anything_is_computed(tiny, tmp_path):
    flags = train_flags(tiny, tmp_path / "run", "--deterministic", **SMALL)
    code = f"""
import os, torch, main
main.main(main.get_args_parser().parse_args({flags!r}))
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    (tmp_path / "script.py").write_text(code)
    run = run_script(tmp_path / "script.py", [])
    assert run.returncode == 0, run.stderr


def test_the_flags_of_saving_are_everywhere_the_same():
    import main_finetune
    import main_linear

    for script in (main, main_linear, main_finetune):
        flags = [] if script is main else ["--pretrained", "x"]
        args = script.get_args_parser().parse_args(flags)
        assert (args.save_every_minutes, args.keep_last, args.skip_nonfinite) == (30, 2, 0)
