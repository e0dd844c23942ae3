"""The log of a run: epochs that run again, other runs in a folder, settings, silent ranks."""

import json

import pytest
import torch
from helpers import train_flags, without_folder

import main
from infra import logger
from infra.logger import Logger
from utils import InputError


def test_the_log_leaves_out_epochs_that_run_again(tmp_path):
    log = Logger(tmp_path)
    for epoch in range(3):
        log.epoch({"epoch": epoch, "train_loss": 1.0})
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines(keepends=True)
    lines[1:1] = ["5\n", "{}\n", "half a li\n"]  # one damaged line costs no other
    lines += ['{"epoch": 3, "tr']  # a kill in the midst of a line
    (tmp_path / "log.txt").write_text("".join(lines))
    Logger(tmp_path, first_epoch=2).close()
    assert [row["epoch"] for row in logger.read_log(tmp_path / "log.txt")] == [0, 1]


def test_a_log_of_another_run_is_kept_aside(tmp_path):
    (tmp_path / "log.txt").write_text("my notes\n")
    Logger(tmp_path).close()
    assert (tmp_path / "log.txt.old").read_text() == "my notes\n"
    assert not (tmp_path / "log.txt").exists()


def test_names_that_are_no_text(tmp_path):
    """The folder is refused, as TensorBoard cannot write there; other paths may be so named."""
    with pytest.raises(InputError, match="need a name in UTF-8; choose another"):
        Logger(f"{tmp_path}/\udcff")
    log = Logger(tmp_path)
    log.settings({"root": "a\udcff"})
    log.close()
    assert json.loads((tmp_path / "args.json").read_text()) == {"root": "a\udcff"}


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert logger.git_revision() is None


def test_silent_log_does_nothing():
    log = logger.SilentLog()
    log.info("x")
    log.scalars({}, 3)
    with log.progress(3, "epoch") as report:
        report(1, {}, {})


def test_settings_are_what_a_reader_needs(tmp_path):
    import argparse

    settings = logger.describe_run(argparse.Namespace(lr=0.1), effective_batch=8)
    assert settings["args"] == {"lr": 0.1}
    assert settings["effective_batch"] == 8 and settings["world_size"] == 1
    assert settings["versions"]["torch"] == torch.__version__
    json.dumps(settings)


def test_a_named_run_has_a_folder_of_that_name(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = without_folder(train_flags(tiny, "unused", "--name", "mine", model="CLIP_NANO8"))
    for more in ([], ["--logs", "there"], ["--evaluate"]):
        main.main(main.get_args_parser().parse_args([*flags, *more]))
    for folder in ("logs/mine", "there/mine"):
        assert len(logger.read_log(tmp_path / folder / "log.txt")) == 1
        assert (tmp_path / folder / "checkpoint.pt").exists()
    assert "digits: top1 " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "there"}


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--logs", "a"], "--logs a: the run in it has no name; give --name as well"),
        (["--name", "a/b"], "--name 'a/b' is no name of a folder; put the path into --logs"),
        (["--name", ".."], "--name '..' is no name of a folder"),
        (["--name", ""], "--name '' is no name of a folder"),
    ],
)
def test_names_that_are_none(flags, match):
    with pytest.raises(InputError, match=match):
        main.output_folder(main.get_args_parser().parse_args(flags))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    left = [tmp_path / f"{name}.{'0' * 16}.tmp" for name in ("log.txt", "args.json")]
    for path in left:
        path.write_text("half")
    logger.Logger(tmp_path, writers=()).close()
    assert not any(path.exists() for path in left)
