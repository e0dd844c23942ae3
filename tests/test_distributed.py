"""Launchers' environments, errors of scripts, and the gathers that all ranks share."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import utils
from infra import distributed, faults
from utils import InputError


def test_an_input_error_is_one_line_and_exit_code_2(capsys):
    def fail():
        raise InputError("Caught InputError in worker.\nTraceback\nutils.InputError: image x.jpg")

    with pytest.raises(SystemExit) as stop:
        distributed.run_script(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image x.jpg\n"


@pytest.mark.parametrize("number", faults.DISK_FAULTS)
def test_a_full_disk_is_one_line(capsys, monkeypatch, tmp_path, number):
    """Whatever is written: results, features, conversions, reports."""

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit) as stop:
        distributed.run_script(lambda: utils.update_json(tmp_path / "results.json", {}))
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    told = re.escape(f"error: {tmp_path}/results.json: {os.strerror(number)}; ")
    told += "(free space|allow writing there), or choose another folder\n"
    assert re.fullmatch(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, told",
    [
        ("unable to allocate shared memory(shm) for file </x>: No space", "0 workers, .*shm-size"),
        (
            "DataLoader worker (pid 3) is killed by signal: Bus error. It is",
            "0 workers, .*shm-size",
        ),
        (
            "DataLoader worker (pid 3) is killed by signal: Killed.",
            "memory ran out; take fewer workers",
        ),
        ("received 0 items of ancdata", "ulimit -n"),
    ],
)
def test_a_machine_too_small_for_the_loader_is_one_line(capsys, words, told):
    def fail():
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTrace\n{words}")

    with pytest.raises(SystemExit) as stop:
        distributed.run_script(fail)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(told, error)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        distributed.run_script(lambda: 1 / 0)


def test_cuda_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="use cpu"):
        distributed.init_distributed("cuda")


@pytest.mark.parametrize(
    "gpus, local_rank, chosen", [(1, 3, 0), (1, 0, 0), (4, 3, 3), (2, 3, None)]
)
def test_a_rank_takes_its_gpu_or_the_only_one_it_sees(monkeypatch, gpus, local_rank, chosen):
    """Slurm's option gpus-per-task shows each rank one GPU."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if chosen is None:
        with pytest.raises(InputError, match="this node has 2 GPUs; start no more than 2"):
            distributed.choose_device("cuda", False)
    else:
        assert distributed.choose_device("cuda", False).type == "cuda" and taken == [chosen]


@pytest.mark.parametrize("uuids, shared", [("abc", None), ("aba", "0 and 2"), ("abb", "1 and 2")])
def test_ranks_that_share_a_gpu_are_told(monkeypatch, uuids, shared):
    own = SimpleNamespace(uuid=uuids[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    monkeypatch.setattr(distributed, "all_gather_object", lambda values: values + list(uuids[1:]))
    with pytest.raises(InputError, match=f"ranks {shared} have") if shared else nullcontext():
        distributed.check_gpus()


@pytest.mark.parametrize(
    "environment, match",
    [
        ({"RANK": "x"}, "RANK='x' in the environment is no number; unset it"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is none of WORLD_SIZE=2 ranks"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is none of WORLD_SIZE=0 ranks"),
        ({"WORLD_SIZE": "9" * 400}, "is no number"),
        (
            {"WORLD_SIZE": "2", "MASTER_PORT": "x", "MASTER_ADDR": "::1"},
            "cannot meet at env://: .*'x'; ",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "MASTER_ADDR expected, but not set; correct ",
        ),
    ],
)
def test_garbage_from_a_launcher_is_told(monkeypatch, environment, match):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        distributed.init_distributed("cpu")


def test_a_local_rank_that_is_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(InputError, match="LOCAL_RANK='first' in the environment is no number"):
        distributed.rank_zero_first(lambda: 1)


def test_turns_have_no_limit_of_time(monkeypatch):
    """No collective, which would give up after half an hour: ranks look whether all have come."""
    mine, done, watchdog = threading.local(), [], SimpleNamespace(store=dist.HashStore())
    monkeypatch.setattr(distributed, "get_rank", lambda: mine.rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed.Watchdog, "current", lambda: watchdog)
    monkeypatch.setattr(distributed, "env_int", lambda name, default: int(mine.rank == 2))

    def work():
        time.sleep(0.2 if mine.rank == 0 else 0)
        done.append(mine.rank)
        if mine.rank == 0:
            raise InputError("no such file")
        return mine.rank

    def run(rank):
        mine.rank = rank
        results = [distributed.rank_zero_first(lambda: len(done))]
        try:
            return [*results, distributed.rank_zero_first(work)]
        except InputError as error:
            return [*results, str(error)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [[0, "no such file"], [0, 1], [0, 2]]
    assert done == [0, 1, 2]
