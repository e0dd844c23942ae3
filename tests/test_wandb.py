"""The log in Weights & Biases, by a package that notes its calls; its faults never end a run."""

import json
import sys
import textwrap

import pytest
import torch
from helpers import rows, train, train_flags
from launch import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra import logger
from infra.logger import Logger, Wandb, check_writers
from utils import InputError

# The calls that the real package has, each noted as a line of JSON.
FAKE = """
    import json, os

    def note(*call):
        with open(os.environ["WANDB_NOTES"], "a") as file:
            file.write(json.dumps(call) + chr(10))

    class Image:
        def __init__(self, pixels):
            self.shape = list(pixels.shape), str(pixels.dtype), int(pixels.max())

    class Config:
        def update(self, values, allow_val_change=False):
            note("config", list(values), allow_val_change)

    class Run:
        config = Config()
        def define_metric(self, name, step_metric):
            note("define", name, step_metric)
        def log(self, values):
            note("log", {k: getattr(v, "shape", v) for k, v in values.items()})
        def finish(self):
            note("finish")

    def init(*, id, resume, name, dir):
        if os.environ.get("WANDB_FAULT"):
            raise RuntimeError("no network" + chr(10) + "at all")
        note("init", id, resume, name, dir)
        return Run()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Installs the package; returns a function of its notes so far."""
    folder = tmp_path / "packages/wandb"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("WANDB_NOTES", str(tmp_path / "notes"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_a_run_and_its_resumption_are_one_there(tiny, tmp_path, notes):
    options = {"model": "CLIP_NANO8", "val": "digits"}
    both = ["--report-to", "wandb", "tensorboard"]
    train(tiny, tmp_path / "mine", *both, **options)
    train(tiny, tmp_path / "mine", *both, epochs=2, **options)
    calls = notes()
    (first, again), folder = [call for call in calls if call[0] == "init"], str(tmp_path / "mine")
    assert first == again == ["init", first[1], "allow", "mine", folder] and len(first[1]) == 8
    assert [call[0] for call in calls].count("finish") == 2 and calls[-1] == ["finish"]
    assert ["define", "train/*", "train/step"] in calls
    logged = [call[1] for call in calls if call[0] == "log"]
    updates = [values for values in logged if "train/loss" in values]
    assert [values["train/step"] for values in updates] == list(range(8))
    epochs = [values for values in logged if "epoch/train_loss" in values]
    assert [values["epoch/step"] for values in epochs] == [0, 1]
    log = rows(tmp_path / "mine")
    assert [values["epoch/test_acc1"] for values in epochs] == [row["test_acc1"] for row in log]
    (picture,) = [values["views"] for values in logged if "views" in values]
    assert picture[0][2] == 3 and picture[1] == "uint8" and picture[2] > 1
    assert ["config", list(json.loads((tmp_path / "mine/args.json").read_text())), True] in calls
    assert len(EventAccumulator(folder).Reload().Scalars("train/loss")) == 8

    train(tiny, tmp_path / "other", "--report-to", "wandb", **options)
    assert notes()[-1] == ["finish"] and not list((tmp_path / "other").glob("events*"))
    assert [call for call in notes() if call[0] == "init"][-1][1] != first[1]


def test_a_run_without_writers(tiny, tmp_path):
    train(tiny, tmp_path, "--report-to", model="CLIP_NANO8", val="none")
    assert len(rows(tmp_path)) == 1 and not list(tmp_path.glob("events*"))


def test_a_service_that_fails_never_ends_a_run(tiny, tmp_path, notes, monkeypatch, capsys):
    flags, options = ["--report-to", "wandb"], {"model": "CLIP_NANO8", "val": "none"}
    monkeypatch.setenv("WANDB_FAULT", "1")
    train(tiny, tmp_path / "a", *flags, **options)
    assert capsys.readouterr().out.count("warning: wandb is incomplete: no network at all\n") == 1
    monkeypatch.delenv("WANDB_FAULT")
    monkeypatch.setattr(Wandb, "scalars", lambda *_: 1 / 0)
    train(tiny, tmp_path / "b", *flags, **options)
    assert capsys.readouterr().out.count("warning: wandb is incomplete: division by zero") == 1
    assert len(rows(tmp_path / "a")) == len(rows(tmp_path / "b")) == 1


def test_an_upload_that_hangs_does_not_hold_up_the_end(tmp_path, notes, monkeypatch, capsys):
    import threading

    import wandb

    end = threading.Event()
    monkeypatch.setattr(Wandb, "patience", 0.01)
    monkeypatch.setattr(wandb.Run, "finish", lambda self: end.wait(60))
    log = Logger(tmp_path, writers=["wandb"])
    log.close()
    log.close()  # as a run that a signal stops
    end.set()
    assert (
        "warning: wandb is incomplete: its upload was not done in 0.01 s" in capsys.readouterr().out
    )


def test_a_damaged_id_costs_the_writer_alone(tmp_path, notes, capsys):
    (tmp_path / "wandb.json").write_text("[")
    log = Logger(tmp_path, first_update=3, writers=["wandb"])
    log.scalars({"train/loss": torch.tensor(1.0)}, 3)
    assert "warning: wandb is incomplete: wandb's id" in capsys.readouterr().out
    assert not log.writers


def test_a_full_disk_costs_tensorboard_alone(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    log = Logger(tmp_path)
    monkeypatch.setattr(log.writers["tensorboard"].writer, "add_scalar", full)
    log.epoch({"epoch": 0, "a": 1.0})
    log.epoch({"epoch": 1, "a": 1.0})
    assert (
        capsys.readouterr().out == "warning: tensorboard is incomplete: No space left on device\n"
    )
    assert len(logger.read_log(tmp_path / "log.txt")) == 2


def test_without_the_package_nothing_is_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # the package's own folder of runs is no package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logger, "find_spec", lambda name: type("Spec", (), {"origin": None}))
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb, or report"):
        train(tiny, tmp_path / "out", "--report-to", "wandb", val="none")
    assert not (tmp_path / "out").exists()
    check_writers(["tensorboard"])
    with pytest.raises(InputError, match="--report-to: 'a,b' is no writer; give .* blanks between"):
        train(tiny, tmp_path / "out", "--report-to", "a,b", val="none")


def test_the_package_itself_offline(tiny, tmp_path):
    """A run that resumes goes on under the same id; losses are those of a run without it."""
    for name, extra in (("a", ["--report-to", "wandb"]), ("b", [])):
        for epochs in (1, 2):
            flags = train_flags(tiny, tmp_path / name, *extra, epochs=epochs)
            run = run_script("main.py", flags, WANDB_MODE="offline", WANDB_SILENT="true")
            assert run.returncode == 0, run.stderr
    ids = [folder.name.rpartition("-")[2] for folder in tmp_path.glob("a/wandb/offline-run-*")]
    own = json.loads((tmp_path / "a/wandb.json").read_text())["id"]
    assert ids == [own, own]
    kept = [{k: v for k, v in row.items() if "loss" in k} for row in rows(tmp_path / "a")]
    assert len(kept) == 2 and kept == [
        {k: v for k, v in row.items() if "loss" in k} for row in rows(tmp_path / "b")
    ]
