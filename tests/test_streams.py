"""Training and results when stdout or stderr cannot take what is printed."""

import io
import os
import subprocess
import sys

import pytest
from helpers import train_flags, weights
from launch import REPOSITORY

import main
from infra import distributed
from infra.streams import tolerant_streams


def full():
    return open("/dev/full", "w")


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def ascii_only():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def closed_before_the_start():
    return None


@pytest.mark.parametrize("kind", [full, broken_pipe, ascii_only, closed_before_the_start])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_training_outlives_its_streams(tiny, tmp_path, monkeypatch, kind, name):
    """With a name of the output folder, which the log prints, that is not ASCII."""
    stream = kind()
    monkeypatch.setattr(sys, name, stream)
    for epochs in (1, 2):  # the second resumes, and names the folder
        options = {"val": "none", "model": "SIMCLR_NANO8", "epochs": epochs}
        args = main.get_args_parser().parse_args(train_flags(tiny, tmp_path / "rün", **options))
        distributed.run_script(lambda args=args: main.main(args))
    assert weights(tmp_path / "rün")["epoch"] == 2
    assert getattr(sys, name) is stream


def test_a_loss_of_text_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", full())
    with tolerant_streams():
        for _ in range(3):
            print("x", flush=True)
    error = capsys.readouterr().err
    assert error == "warning: stdout is incomplete from here on: No space left on device\n"


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    stream = ascii_only()
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_streams():
        print("r\xfcn \udcff")
    assert stream.buffer.getvalue() == b"r\\xfcn \\udcff\n"


CODE = """
import os, sys
sys.path.insert(0, {repository!r})
from infra.distributed import run_script
def script():
    for i in range(9999):
        print("line", i)
    assert os.open(os.devnull, os.O_RDONLY) > 2
run_script(script)
"""


@pytest.mark.parametrize(
    "command",
    [
        '{} -c "$CODE" > /dev/full',
        '{} -c "$CODE" >&- 2>&-',
        '{} -c "$CODE" | head -1',
    ],
)
def test_a_process_ends_with_code_0_whatever_becomes_of_its_output(command):
    """Also Python's own last flush, which would make it 120."""
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.format(sys.executable)],
        env=os.environ | {"CODE": CODE.format(repository=str(REPOSITORY))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Exception" not in run.stderr and "Error" not in run.stderr
