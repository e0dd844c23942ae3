"""Storage that never answers: a signal is obeyed while a loader waits, and nothing is lost."""

import signal
import time

import pytest
from helpers import train_flags
from launch import run_script, start
from test_resume import assert_same_run

SMALL = {"val": "none", "model": "SIMCLR_NANO8"}


@pytest.mark.parametrize(
    "ranks, number, extra, done",
    [
        (1, 8 + 11, [], 2),  # 8 for the picture of the views, in the main process
        (1, 8 + 6, ["--workers", 2], 2),
        (1, 8 + 7, ["--batch-size", 2, "--update-freq", 2], 1),  # in mid-update
        (1, 8 + 7, ["--batch-size", 2, "--update-freq", 2, "--accum", "exact"], 1),
        (2, 6, ["--batch-size", 2], 2),
        (2, 3, ["--batch-size", 2, "--workers", 2], 2),
        (2, 4, ["--batch-size", 1, "--update-freq", 2], 1),
    ],
)
def test_a_signal_is_obeyed_while_storage_is_stuck(tiny, tmp_path, ranks, number, extra, done):
    """On every rank; and the run, resumed, equals an undisturbed one."""
    flags = train_flags(tiny, tmp_path / "parts", *extra, **SMALL)
    running = start("tests/lives.py", ["hang", number, "main", *flags], tmp_path / "log", ranks)
    assert running[-1].says("stuck"), running[0].text()
    time.sleep(1)
    for process in running:
        process.signal(signal.SIGTERM)
    sent = time.monotonic()
    assert [process.wait(30) for process in running] == [0] * ranks
    assert time.monotonic() - sent < 15
    text = running[0].text()
    assert f"stopped by SIGTERM after 0 epochs and {done} updates; the same command" in text
    assert all("Traceback" not in process.text() for process in running), running[-1].text()
    for folder in ("parts", "whole"):
        run = run_script("main.py", train_flags(tiny, tmp_path / folder, *extra, **SMALL), ranks)
        assert run.returncode == 0, run.stderr
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_so_it_is_in_validation(tiny, tmp_path):
    options = {"model": "CLIP_NANO8"}
    flags = train_flags(tiny, tmp_path / "parts", "--workers", 1, **options)
    number = 8 + 5  # in the worker of the validation, which counts on from the main process
    hang = ["hang", number, "main", *flags, "--batch-size", 16]
    (running,) = start("tests/lives.py", hang, tmp_path / "log")
    assert running.says("stuck"), running.text()
    time.sleep(1)
    running.signal(signal.SIGTERM)
    assert running.wait(15) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_hang_up_save_too(tiny, tmp_path, signum):
    """With the exit code of a shell, so that a script of commands does not take it as done."""
    extra = ["--workers", 2, "--batch-size", 2]
    flags = train_flags(tiny, tmp_path / "parts", *extra, **SMALL)
    (running,) = start("main.py", flags, tmp_path / "log")
    assert running.says("epoch 0 [2/8]"), running.text()
    running.signal(signum, whole_group=True)  # as a terminal does
    assert running.wait(15) == 128 + signum
    assert f"stopped by {signum.name} after 0 epochs and " in running.text()
    assert "Traceback" not in running.text()
    for folder in ("parts", "whole"):
        run = run_script("main.py", train_flags(tiny, tmp_path / folder, *extra, **SMALL))
        assert run.returncode == 0, run.stderr
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_second_signal_ends_a_rank_at_once(tiny, tmp_path):
    """Also one that waits in a collective for another, which waits for its storage."""
    flags = train_flags(tiny, tmp_path / "run", "--batch-size", 2, **SMALL)
    running = start("tests/lives.py", ["hang", 6, "main", *flags], tmp_path / "log", 2)
    assert running[1].says("stuck")
    time.sleep(1)
    running[0].signal(signal.SIGTERM)
    running[0].signal(signal.SIGTERM)  # passed on by a launcher: the same one
    time.sleep(2)
    assert running[0].process.is_alive()
    running[0].signal(signal.SIGTERM)
    assert running[0].wait(10) == 128 + signal.SIGTERM
    assert "ended at once by a second signal, SIGTERM" in running[0].text()
    running[1].signal(signal.SIGKILL)
    running[1].wait()
