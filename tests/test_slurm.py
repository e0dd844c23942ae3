"""A job that Slurm takes away, in three ways, ends as if nothing had happened.

`python3 tests/slurm_cluster.py start DIR` makes a cluster of one machine.
"""

import re
import subprocess
import sys
import time

import pytest
import torch
from helpers import train, train_flags, without_folder, write_coco
from launch import REPOSITORY, run_script

from infra import checkpoint, logger

pytestmark = pytest.mark.slurm

MODEL = {"model": "SLIP_VITTINY8", "val": "none"}
SPEED = {"samples_per_sec", "data_wait"}  # of an epoch: no two runs share them


def command(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


# How a job is taken away; to the last way Slurm gives it a minute, and SIGTERM alone.
WAYS = [
    lambda number: command("scancel", "--signal=USR2", number),
    lambda number: command("scontrol", "requeue", number),
    lambda _: command("sbatch", *"-p urgent --exclusive -o /dev/null --wrap true".split()),
]


def submit(folder, flags):
    """Queues main.py on two tasks, as a user does, from elsewhere; returns the job's id."""
    launcher = "--cluster slurm --ngpus 0 --nodes 1 --tasks-per-node 2 --cpus 1 --mem 1.5 "
    launcher += f"--timeout 30 --slurm nice=1 --shared_dir {folder}"
    script = [sys.executable, str(REPOSITORY / "run_with_submitit.py"), *launcher.split()]
    said = subprocess.run(
        [*script, *flags], check=True, capture_output=True, text=True, timeout=120, cwd=folder
    )
    return re.search(r"submitted job (\d+)", said.stdout)[1]


class Job:
    """A job of the cluster, and what its first task prints."""

    def __init__(self, number, folder):
        self.number, self.folder = number, folder / number

    def facts(self):
        """What Slurm says of the job, {"JobState": "RUNNING", ...}."""
        shown = command("scontrol", "show", "--oneliner", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def text(self, kind="out"):
        file = self.folder / f"{self.number}_0_log.{kind}"
        return file.read_text() if file.exists() else ""

    def wait_for(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            state = self.facts()["JobState"]
            if time.monotonic() > end or state in ("FAILED", "CANCELLED", "TIMEOUT"):
                pytest.fail(f"job is {state}: {self.text()}\n{self.text('err')}")
            time.sleep(0.25)

    def wait_for_progress(self):
        """Until the task has started once more, and reported some updates."""
        said = len(re.findall("^epoch", self.text(), re.M))
        self.wait_for(lambda: len(re.findall("^epoch", self.text(), re.M)) > said)

    def wait_for_queue(self, restarts):
        """Until the job waits again, and then no longer: Slurm would wait two minutes."""
        self.wait_for(lambda: int(self.facts()["Restarts"]) == restarts)
        self.wait_for(lambda: self.facts()["JobState"] in ("PENDING", "RUNNING"))
        if self.facts()["JobState"] == "PENDING":
            command("scontrol", "update", f"JobId={self.number}", "StartTime=now")


def test_a_job_taken_away_three_times_ends_as_an_undisturbed_run(tiny, tmp_path):
    write_coco(tmp_path / "data", images=128)

    # A job that is queued again is given its first --resume again, too.
    first = train(tiny, tmp_path / "first", **MODEL) / "checkpoint.pt"
    extra = f"--resume {first} --workers 1 --print-freq 2 --warmup-epochs 0".split()

    def flags(folder):
        return train_flags(tmp_path / "data", folder, *extra, **MODEL, epochs=3)

    job = Job(submit(tmp_path, without_folder(flags("unused"))), tmp_path)
    for restarts, take_away in enumerate(WAYS, 1):
        job.wait_for_progress()
        take_away(job.number)
        job.wait_for_queue(restarts)
    job.wait_for(lambda: job.facts()["JobState"] == "COMPLETED")

    facts, text = job.facts(), job.text()
    assert facts["Restarts"] == str(len(WAYS)) and facts["ExitCode"] == "0:0"
    assert re.findall(r"^stopped by (\w+)", text, re.M) == ["SIGUSR2", "SIGTERM", "SIGTERM"]
    resumed = re.findall(r"^resumed (\S+) after", text, re.M)
    assert resumed == [str(first), *len(WAYS) * [str(job.folder / "checkpoint.pt")]]

    other = run_script("main.py", flags(tmp_path / "undisturbed"), ranks=2)
    assert other.returncode == 0, other.stderr
    assert_equal_runs(job.folder, tmp_path / "undisturbed")


def assert_equal_runs(one, two):
    """Weights, moments and losses, bit for bit."""
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (one, two))
    for key in ("state_dict", "optimizer", "epoch"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    a, b = (logger.read_log(folder / "log.txt") for folder in (one, two))
    assert [{k: v for k, v in row.items() if k not in SPEED} for row in a] == [
        {k: v for k, v in row.items() if k not in SPEED} for row in b
    ]
