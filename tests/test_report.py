"""The table and the picture of runs."""

import json

import pytest
from PIL import Image

import report
from utils import InputError


@pytest.fixture
def runs(tmp_path):
    for name, loss in (("slip", "train_clip_loss"), ("simclr", "train_ssl_loss")):
        folder = tmp_path / name
        folder.mkdir()
        row = {"train_loss": 2.5, loss: 1.25, "samples_per_sec": 100.4}
        lines = [json.dumps({**row, "epoch": e, "test_acc1": 10.0 * e}) for e in range(3)]
        (folder / "log.txt").write_text("\n".join(lines) + "\n")
        (folder / "args.json").write_text(json.dumps({"args": {"model": f"{name}_X"}}))
    results = {"digits": {"accuracy": 91.234}}
    (tmp_path / "slip/results.json").write_text(json.dumps(results))
    return tmp_path


def test_table_and_picture(runs, capsys):
    flags = [str(runs / "slip"), str(runs / "simclr"), "--picture", str(runs / "r.png")]
    report.main(report.get_args_parser().parse_args(flags))
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| run | model | epochs | samples/s | loss | digits (%) |"
    assert table[2] == "| slip | slip_X | 3 | 100 | clip_loss 1.250 | 91.23 |"
    assert table[3] == "| simclr | simclr_X | 3 | 100 | loss 2.500 |  |"
    assert Image.open(runs / "r.png").size == (1200, 480)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it holds no log.txt"):
        report.read_run(tmp_path)
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(InputError, match="holds no finished epoch"):
        report.read_run(tmp_path)
