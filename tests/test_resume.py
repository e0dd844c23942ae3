"""An interrupted run equals an undisturbed one, however it ended: docs/reliability.md says which.

Run with -s to see the figures that page quotes.
"""

import math
import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from helpers import assert_equal, rows, step_losses, train, train_flags, weights, write_shards
from launch import run_command, run_script, start
from test_main_finetune import flags as finetune_flags
from test_main_linear import flags as probe_flags
from test_main_linear import result

import utils
from infra import checkpoint

CLOCK = ("samples_per_sec", "data_wait")  # what may differ between two runs


def small(tiny, folder, *extra, epochs=2, val="none", model="SIMCLR_NANO8"):
    """Flags of a training whose checkpoint is small: a SimCLR of 4 updates an epoch."""
    return train_flags(tiny, folder, *extra, epochs=epochs, val=val, model=model)


def assert_same_run(folder, other):
    """Equal to the last bit: losses of each update, epochs' means, weights, optimizer, counts."""
    assert step_losses(folder) == step_losses(other)
    for row, expected in zip(rows(folder), rows(other), strict=True):
        assert {k: v for k, v in row.items() if k not in CLOCK} == {
            k: v for k, v in expected.items() if k not in CLOCK
        }
    got, expected = weights(folder), weights(other)
    for key in ("state_dict", "optimizer", "scaler", "epoch", "best_acc1", "random"):
        assert_equal(got.get(key), expected.get(key))
    for state in (got, expected):
        del state["progress"]["elapsed"], state["progress"]["waited"]
    assert_equal(got["progress"], expected["progress"])


def run_stopped(folder, script, flags, ranks=1):
    """A script that is stopped wherever it can be, and started again until it is over."""
    (folder / "meet").mkdir()
    run = run_script("tests/lives.py", ["stop", folder / "meet", script, *flags], ranks)
    assert run.returncode == 0, run.stderr
    return run


# Of three ranks, because sums of two do not depend on their order.
@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4), (3, 0)])
def test_a_run_stopped_at_every_update_equals_an_undisturbed_one(
    tiny, tmp_path, ranks, workers, capsys
):
    extra = ["--workers", workers, "--print-freq", 3, "--batch-size", 4 // ranks]
    options = {"epochs": 2 if ranks < 3 and not workers else 1}  # over an epoch's end, too
    flags = [small(tiny, tmp_path / name, *extra, **options) for name in ("whole", "parts")]
    whole = run_script("main.py", flags[0], ranks)
    assert whole.returncode == 0, whole.stderr
    parts = run_stopped(tmp_path, "main", flags[1], ranks)
    updates = weights(tmp_path / "whole")["progress"]["updates"]
    assert f"lives: {updates + 1}\n" in parts.stdout  # stopped after each of them
    assert "stopped by SIGUSR2 after 0 epochs and 3 updates; the same command" in parts.stdout
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    with capsys.disabled():
        print(f"\nresumed at each of {updates} updates: {ranks} ranks, {workers} workers")


def test_so_does_one_on_shards(tiny, tmp_path, ranks=3, workers=2):
    """With more ranks x workers than shards, within and between the windows of its order."""
    pattern = write_shards(tmp_path / "shards", [10, 10, 10, 3])
    extra = ["--dataset", "webdataset", "--metadata", pattern, "--root", "", "--workers", workers]
    extra += ["--shuffle-window", 2, "--batch-size", 6 // ranks, "--print-freq", 3]
    flags = [small(tiny, tmp_path / name, *extra, epochs=1) for name in ("whole", "parts")]
    whole = run_script("main.py", flags[0], ranks)
    assert whole.returncode == 0, whole.stderr
    run_stopped(tmp_path, "main", flags[1], ranks)
    assert weights(tmp_path / "whole")["progress"]["updates"] == 5
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "extra",
    [
        ["--update-freq", 2, "--accum", "exact", "--image-size", 16, "--patch-dropout", 0.5],
        ["--update-freq", 2, "--precision", "fp16"],
        ["--precision", "bf16", "--clip-grad-norm", 1, "--augment", "device"],
    ],
)
def test_so_does_one_of_every_precision_and_accumulation(tiny, tmp_path, extra):
    whole = train(tiny, tmp_path / "whole", *extra, model="SIMCLR_NANO8", epochs=2)
    run_stopped(tmp_path, "main", small(tiny, tmp_path / "parts", *extra))
    assert_same_run(tmp_path / "parts", whole)


def test_so_does_one_that_is_stopped_in_validation(tiny, tmp_path):
    """At each of its batches, of prompts and of images."""
    options = {"val": "digits", "model": "CLIP_NANO8", "epochs": 1}
    extra = ["--batch-size", 8]
    whole = train(tiny, tmp_path / "whole", *extra, **options)
    parts = run_stopped(tmp_path, "main", small(tiny, tmp_path / "parts", *extra, **options))
    places = 2 + 1 + math.ceil(30 / 8)  # before the two updates, the prompts, and the images
    assert f"lives: {places + 1}\n" in parts.stdout
    assert_same_run(tmp_path / "parts", whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fine_tuning_stopped_at_every_update(probed, tmp_path, ranks):
    """With drop path, Mixup, random erasing and the average of weights, which draw numbers."""
    extra = ["--drop-path", 0.2, "--model-ema", "--model-ema-decay", 0.5]
    extra += ["--batch-size", 20 // ranks]
    flags = finetune_flags(probed, tmp_path / "whole", *extra)
    whole = run_script("main_finetune.py", flags, ranks)
    assert whole.returncode == 0, whole.stderr
    flags = finetune_flags(probed, tmp_path / "parts", *extra)
    run_stopped(tmp_path, "main_finetune", flags, ranks)
    parts, whole = tmp_path / "parts/finetune-digits", tmp_path / "whole/finetune-digits"
    assert_same_run(parts, whole)
    assert_equal(weights(parts)["ema"], weights(whole)["ema"])
    for name in ("finetune", "finetune-ema"):
        assert result(tmp_path / "parts", name) == result(tmp_path / "whole", name)


def test_a_probe_stopped_at_every_update(probed, tmp_path):
    whole = run_script("main_linear.py", probe_flags(probed, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    run_stopped(tmp_path, "main_linear", probe_flags(probed, tmp_path / "parts"))
    assert_same_run(tmp_path / "parts/linear-digits", tmp_path / "whole/linear-digits")
    assert result(tmp_path / "parts", "linear") == result(tmp_path / "whole", "linear")


def test_on_another_number_of_ranks_the_losses_agree(tiny, tmp_path):
    """Two ranks of 4, then one with two micro-batches of 4: the same samples, views and loss."""
    exact = ["--accum", "exact", "--batch-size", 4, "--gather-with-grad"]
    options = {"model": "SLIP_NANO8", "epochs": 3}
    whole = run_script("main.py", small(tiny, tmp_path / "whole", *exact, **options), 2)
    assert whole.returncode == 0, whole.stderr
    parts = tmp_path / "parts"
    first = start("main.py", small(tiny, parts, *exact, **options), tmp_path / "log", 2)
    assert first[0].says("epoch 0 [2/2]")
    first[1].signal(signal.SIGTERM)
    assert [process.wait() for process in first] == [0, 0]
    done = weights(parts)["progress"]["updates"]
    assert 2 <= done < 6
    train(tiny, parts, *exact, "--update-freq", 2, val="none", **options)
    assert step_losses(parts) == pytest.approx(step_losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("ranks, whole_group", [(1, True), (2, False)])
def test_a_signal_saves_and_ends_all_ranks_with_code_0(tiny, tmp_path, signum, ranks, whole_group):
    """To the last rank alone, or to a process and its loader's workers together."""
    flags = small(tiny, tmp_path / "run", "--workers", 2, "--batch-size", 2, epochs=1000)
    running = start("main.py", flags, tmp_path / "log", ranks)
    assert running[0].says("epoch 1 [1/"), running[0].text()
    sent = time.monotonic()
    running[-1].signal(signum, whole_group)
    assert [process.wait(60) for process in running] == [0] * ranks
    assert time.monotonic() - sent < 30
    text = running[0].text()
    assert f"stopped by {signum.name} after " in text
    assert all("Traceback" not in process.text() for process in running), running[-1].text()
    progress = weights(tmp_path / "run")["progress"]
    assert progress["updates"] == progress["epoch"] * (8 // ranks) + progress["step"] > 0
    assert f"after {progress['epoch']} epochs and {progress['step']} updates" in text


# ---------------------------------------------------------------------------------------------
# SIGKILL

KILLS = 30


def unfinished(folder):
    return list(folder.glob("checkpoint.pt.*.tmp"))


def kill_in_a_save(running, folder, rng):
    """Kills the process group while it writes its second or a later checkpoint."""
    latest = folder / "checkpoint.pt"
    before = latest.exists() and latest.stat().st_mtime
    running.wait_for(lambda: latest.exists() and latest.stat().st_mtime != before)
    time.sleep(rng.random() * 0.15)
    running.wait_for(lambda: unfinished(folder))
    time.sleep(rng.random() * 0.005)  # writing takes longer, also on a fast disk
    running.kill()
    return bool(unfinished(folder))


def kill_at_random(running, rng):
    """At a moment of starting up, training or saving."""
    if rng.random() < 0.8:
        running.wait_for(lambda: re.search(r"epoch \d+ \[", running.text()))
    time.sleep(rng.random() * 0.15)
    running.kill()


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tiny, tmp_path, capsys):
    """Every update is saved; half of the kills come while a file is being written."""
    rng, folder, kills, in_saves = random.Random(0), tmp_path / "parts", 0, 0
    extra = ["--update-freq", 2, "--accum", "exact", "--batch-size", 2, "--workers", 1]
    options = {"epochs": 24}
    flags = small(tiny, folder, *extra, "--save-every-minutes", 1e-9, **options)
    while kills < KILLS:
        (running,) = start("main.py", flags, tmp_path / f"log{kills}")
        if kills % 2:
            in_saves += kill_in_a_save(running, folder, rng)
        else:
            kill_at_random(running, rng)
        assert running.process.exitcode == -signal.SIGKILL, running.text()
        kills += 1
    done = weights(folder)["progress"]["updates"]
    last = run_script("main.py", small(tiny, folder, *extra, **options))
    assert last.returncode == 0, last.stdout
    assert "is damaged" not in last.stdout and "could not be saved" not in last.stdout
    whole = run_script("main.py", small(tiny, tmp_path / "whole", *extra, **options))
    assert whole.returncode == 0, whole.stderr
    for key in ("state_dict", "optimizer", "random"):
        assert_equal(weights(folder)[key], weights(tmp_path / "whole")[key])
    assert [r["train_loss"] for r in rows(folder)] == [
        r["train_loss"] for r in rows(tmp_path / "whole")
    ]
    assert in_saves >= KILLS // 3
    assert not list(folder.glob("*.tmp"))  # of the killed ones
    with capsys.disabled():
        print(
            f"\nkills survived: {kills}, {in_saves} of them while a checkpoint was being written, "
        )
        print(f"within the first {done} updates")


# ---------------------------------------------------------------------------------------------
# A rank that is gone


@pytest.mark.parametrize(
    "how, cause",
    [
        ("exit", "rank 1 gave no sign of life for 3 s: killed, or the machine is gone"),
        ("kill", "rank 1 gave no sign of life for 3 s: killed, or the machine is gone"),
        ("raise", "rank 1 failed: RuntimeError: rank 1 has had enough"),
    ],
)
def test_a_dead_rank_ends_the_others(tiny, tmp_path, how, cause):
    flags = ["die", how, *small(tiny, tmp_path / "run", "--batch-size", 2, epochs=1000)]
    first, second = start("tests/lives.py", flags, tmp_path / "log", 2)
    assert second.wait() == {"exit": 3, "kill": -signal.SIGKILL, "raise": 1}[how]
    died = time.monotonic()
    assert first.wait() == 1
    assert time.monotonic() - died < 60
    assert f"error (rank 0): stopped, as {cause}" in first.text(), first.text()


def test_torchrun_starts_a_run_again_and_it_goes_on(tiny, tmp_path):
    whole = run_script("main.py", small(tiny, tmp_path / "whole", "--batch-size", 2), 2)
    assert whole.returncode == 0, whole.stderr
    extra = ["--batch-size", 2, "--save-every-minutes", 1e-9]
    flags = ["once", tmp_path / "marker", *small(tiny, tmp_path / "parts", *extra)]
    run = run_command("tests/lives.py", flags, ranks=2, options=["--max-restarts", "1"])
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "marker").exists() and "resumed " in run.stdout
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------
# Files that cannot be written, or read


@pytest.fixture
def small_disk(tiny, tmp_path):
    """Function: checkpoints that fit -> a folder on a disk of that size."""
    train(tiny, tmp_path / "roomy", val="none", model="SIMCLR_NANO8")
    size, mount = (tmp_path / "roomy/checkpoint.pt").stat().st_size, tmp_path / "small"
    mount.mkdir()

    def make(checkpoints):
        options = f"size={int(checkpoints * size)}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount])
        if mounted.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return mount / "run"

    yield make
    subprocess.run(["umount", mount], stderr=subprocess.DEVNULL)


def test_a_full_disk_costs_checkpoints_but_not_the_run(tiny, small_disk):
    """The last one, however, is needed: the run ends with an error, on any number of ranks."""
    folder = small_disk(1.5)
    for ranks in (1, 2):
        extra = ["--keep-last", 1, "--batch-size", 4 // ranks]
        run = run_script("main.py", small(tiny, folder, *extra, epochs=3), ranks)
        assert run.returncode == 2 and "Traceback" not in run.stdout, run.stdout
        assert run.stdout.count("warning: the checkpoint could not be saved (") == 2
        assert (
            f"error: the last checkpoint could not be saved in {folder} (No space left on device); "
            "the one before it is whole; mend that, and the same command resumes from there\n"
        ) in run.stdout
        assert checkpoint.load(folder / "checkpoint.pt")["epoch"] == 1
        assert not unfinished(folder)
    assert "after 1 epochs" in run.stdout


def test_a_disk_that_is_too_small_for_one_checkpoint(tiny, small_disk):
    run = run_script("main.py", small(tiny, small_disk(0.5)))
    assert run.returncode == 2 and run.stdout.count("none has been saved yet") == 3
    assert "is whole" not in run.stdout and "Traceback" not in run.stdout


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, os.unlink])
def test_a_damaged_latest_checkpoint_is_passed_over(tiny, tmp_path, damage, capsys):
    whole = train(tiny, tmp_path / "whole", val="none", model="SIMCLR_NANO8", epochs=3)
    parts = train(tiny, tmp_path / "parts", val="none", model="SIMCLR_NANO8", epochs=2)
    damage(parts / "checkpoint.pt")
    capsys.readouterr()
    args = {"val": "none", "model": "SIMCLR_NANO8", "epochs": 3}
    train(tiny, parts, **args)
    said = capsys.readouterr().out
    assert f"resumed {parts}/checkpoint-00000004.pt after 1 epochs" in said
    if damage is not os.unlink:
        assert f"warning: checkpoint {parts}/checkpoint.pt is damaged: " in said
        assert "; resuming from the one before it" in said
    assert_equal(weights(parts)["state_dict"], weights(whole)["state_dict"])


def test_where_no_checkpoint_is_whole_nothing_starts_anew(tiny, tmp_path):
    train(tiny, tmp_path, val="none", model="SIMCLR_NANO8", epochs=2)
    for path in tmp_path.glob("checkpoint*.pt"):
        empty(path)
    with pytest.raises(utils.InputError, match="no checkpoint in .* is whole, move them away: "):
        train(tiny, tmp_path, val="none", model="SIMCLR_NANO8", epochs=3)


@pytest.mark.parametrize("keep, expected", [(1, []), (2, [8]), (3, [8, 4])])
def test_so_many_checkpoints_are_kept(tiny, tmp_path, keep, expected):
    extra = ["--keep-last", keep]
    train(tiny, tmp_path, *extra, val="none", model="SIMCLR_NANO8", epochs=3)
    found = sorted((int(p.stem[-8:]) for p in tmp_path.glob("checkpoint-*.pt")), reverse=True)
    assert found == expected
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["updates"] == 12
