"""The launcher, through submitit's local executor: real processes, as Slurm would start them."""

import os
import signal
import time
from pathlib import Path

import pytest
from helpers import train_flags, without_folder
from submitit.slurm.slurm import SlurmJobEnvironment

import eval_retrieval
import main
import run_with_submitit
import utils
from infra import logger
from utils import InputError


def launch(flags):
    return run_with_submitit.main(*run_with_submitit.get_args_parser().parse_known_args(flags))


def test_two_interrupted_tasks_resume_as_two_ranks(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # not this version's default
    options = {"model": "SIMCLR_VITTINY8", "val": "none", "epochs": 20}
    script = train_flags(tiny, "unused", "--workers", 2, **options)
    flags = ["--cluster", "local", "--nodes", "1", "--ngpus", "2", "--timeout", "5"]
    flags += ["--shared_dir", str(tmp_path / "shared")]
    job = launch([*flags, *without_folder(script)])
    while not job.done() and "epoch 0" not in (job.stdout() or ""):
        time.sleep(0.05)
    for task in Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split():
        os.kill(int(task), signal.SIGUSR1)

    job.results()
    assert "stopped by SIGUSR1 after" in job.stdout() and "\nresumed " in job.stdout()
    folder = tmp_path / "shared" / job.job_id
    assert (folder / "checkpoint.pt").exists()
    settings = utils.read_json(folder / "args.json", "settings")
    assert settings["world_size"] == 2 and settings["effective_batch"] == 8
    assert [row["pairs"] for row in logger.read_log(folder / "log.txt")] == 20 * [16]


def test_wrong_flags_stop_before_submission(tmp_path):
    with pytest.raises(InputError, match="--modle"):
        launch(["--cluster", "local", "--job_dir", str(tmp_path / "job"), "--modle", "x"])
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "script, match", [("nope", "--script nope: no such script"), ("report", "--output-dir")]
)
def test_scripts_that_cannot_be_jobs(tmp_path, script, match):
    with pytest.raises(InputError, match=match):
        launch(["--cluster", "local", "--job_dir", str(tmp_path / "job"), "--script", script])
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "script, flags, folder",
    [
        (main, "--val-dataset a b --report-to wandb tensorboard", "job"),
        (main, "--output-dir mine", "mine"),
        (main, "--name x --logs there", "there/x"),
        (main, "--name=x", "logs/x"),
        (eval_retrieval, "--name x --resume a --captions b --root c", "job"),
    ],
)
def test_the_folder_of_a_job(script, flags, folder):
    _, argv = run_with_submitit.get_args_parser().parse_known_args(["--ngpus=0", *flags.split()])
    args = run_with_submitit.parse(script, "job", argv)
    assert (main.output_folder(args) if script is main else args.output_dir) == folder
    if "val" in flags:
        assert (args.val_dataset, args.report_to) == (["a", "b"], ["wandb", "tensorboard"])


@pytest.fixture
def sbatch_file(tmp_path, monkeypatch):
    """A function that submits to a fake sbatch and returns the lines of the submission file."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def submit(flags):
        job = launch(["--cluster", "slurm", "--job_dir", str(tmp_path / "job%j"), *flags])
        assert job.job_id == "7" and job.paths.folder == tmp_path / "job7"
        return job.paths.submission_file.read_text().splitlines()

    return submit


def test_the_archived_layout_is_the_default(sbatch_file):
    lines = sbatch_file([])
    wanted = "nodes=8 gpus-per-node=8 ntasks-per-node=8 cpus-per-task=14 time=4320 job-name=main"
    assert {f"#SBATCH --{option}" for option in wanted.split()} <= set(lines)
    # It is requeued even if the cluster's default is not to, and warned two minutes before the end.
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR2@120"} <= set(lines)
    srun = next(line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=14" in srun
    unset = ("mem", "partition", "constraint", "account", "qos", "comment")
    assert not [line for line in lines if line.startswith(tuple(f"#SBATCH --{x}" for x in unset))]


@pytest.mark.parametrize(
    "flags, option",
    [
        ("--tasks-per-node 3", "ntasks-per-node=3"),
        ("--ngpus 0", "ntasks-per-node=1"),
        ("--ngpus 0 --tasks-per-node 2", "ntasks-per-node=2"),
        ("--mem 320", "mem=320GB"),
        ("--mem 0.5", "mem=512MB"),
        ("--cpus 4", "cpus-per-task=4"),
        ("--workers 3", "cpus-per-task=7"),
        ("--workers 0", "cpus-per-task=4"),
        ("--timeout 60", "time=60"),
        ("--partition long", "partition=long"),
        ("--constraint a100&ib", "constraint='a100&ib'"),
        ("--use_volta32", "constraint=volta32gb"),
        ("--account lab", "account=lab"),
        ("--qos high", "qos=high"),
        ("--comment deadline", "comment=deadline"),
        ("--slurm nice=100 --slurm licenses=a:1", "nice=100"),
        ("--slurm nice=100 --slurm licenses=a:1", "licenses=a:1"),
        ("--slurm gpus_per_node=a100:4", "gpus-per-node=a100:4"),
        ("--slurm exclusive", "exclusive"),
        ("--ngpus 2 --script main_linear --pretrained x.pt", "job-name=main_linear"),
    ],
)
def test_each_flag_is_an_option_of_sbatch(sbatch_file, flags, option):
    lines = sbatch_file(flags.split())
    assert [x for x in lines if x.startswith(f"#SBATCH --{option.split('=')[0]}")] == [
        f"#SBATCH --{option}"
    ]


def test_without_gpus_none_are_asked_for(sbatch_file):
    assert "--gpus" not in "".join(sbatch_file(["--ngpus", "0"]))


@pytest.mark.parametrize("text", ["=3", "nice=", "Nice=3", "nice 3", "--nice=3", "time=5"])
def test_wrong_slurm_options(text):
    with pytest.raises(InputError, match="--slurm: .* must be key=value|--slurm: .* has a flag"):
        run_with_submitit.get_args_parser().parse_args([f"--slurm={text}"])


def test_the_signal_is_the_one_that_submitit_listens_to(sbatch_file, monkeypatch):
    """Its name differs between versions of submitit, and the job's environment may name another."""
    monkeypatch.setattr(SlurmJobEnvironment, "USR_SIG", "USR1")
    lines = sbatch_file([])
    assert "#SBATCH --signal=USR1@120" in lines
    assert "export SUBMITIT_PREEMPT_SIGNAL=USR1" in lines


def test_a_refusal_by_slurm_is_one_line(sbatch_file, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    with pytest.raises(InputError, match="not submitted: invalid partition"):
        sbatch_file([])


def test_the_local_executor_has_one_node(tmp_path):
    with pytest.raises(InputError, match="Use nodes=1"):
        launch(["--cluster", "local", "--nodes", "2", "--job_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "state, rank, called",
    [
        ("RUNNING", 0, "requeue"),
        ("RUNNING", 1, "bypass"),  # rank 0 requeues for all
        ("COMPLETING", 0, "bypass"),  # scancel, scontrol requeue
        ("CANCELLED", 0, "bypass"),
        ("", 0, "bypass"),
    ],
)
def test_sigterm_queues_only_a_running_job_again(state, rank, called, tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
    (tmp_path / "squeue").chmod(0o755)
    for name, value in {"PATH": tmp_path, "SLURM_JOB_ID": 7, "SLURM_PROCID": rank}.items():
        monkeypatch.setenv(name, str(value))
    seen = []
    kinds = {signal.SIGTERM: "bypass", signal.SIGUSR2: "requeue"}
    before = {
        signum: signal.signal(signum, lambda *_, kind=kind: seen.append(kind))
        for signum, kind in kinds.items()
    }
    try:
        run_with_submitit.requeue_when_preempted()
        signal.raise_signal(signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert seen == [called]


def test_a_preempted_job_is_submitted_again_unchanged():
    job = run_with_submitit.Job("main", ["--epochs", "3"], "runs/%j")
    again = job.checkpoint()
    assert again.function is job
