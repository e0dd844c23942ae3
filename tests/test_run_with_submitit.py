"""The launcher, through submitit's local executor: real processes, as Slurm would start them."""

import pytest
from conftest import train_flags

import run_with_submitit
import utils
from utils import InputError


def launch(flags):
    return run_with_submitit.main(*run_with_submitit.get_args_parser().parse_known_args(flags))


def test_two_tasks_train_as_two_ranks(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = train_flags(tiny, tmp_path / "unused", val="none")
    at = script.index("--output-dir")
    script = script[:at] + script[at + 2 :]
    flags = ["--cluster", "local", "--nodes", "1", "--ngpus", "2", "--timeout", "5"]
    job = launch([*flags, "--shared_dir", str(tmp_path / "shared"), *script])
    job.results()
    folder = tmp_path / "shared" / job.job_id
    assert (folder / "checkpoint.pt").exists()
    settings = utils.read_json(folder / "args.json", "settings")
    assert settings["world_size"] == 2 and settings["effective_batch"] == 8
    assert utils.read_log(folder / "log.txt")[0]["pairs"] == 16


def test_wrong_flags_are_told_before_submission(tmp_path):
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


def test_a_preempted_job_is_submitted_again_unchanged():
    job = run_with_submitit.Job("main", ["--epochs", "3"], "runs/%j")
    again = job.checkpoint()
    assert again.function is job
