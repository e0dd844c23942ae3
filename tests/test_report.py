"""The report: tables, pictures, the page in a real browser, and folders that hold no run."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import report
import transforms
from utils import InputError


def picture():
    import base64

    import torch

    return base64.b64encode(transforms.encode_jpeg(torch.full((3, 40, 60), 200).byte())).decode()


@pytest.fixture
def runs(tmp_path):
    for name, loss in (("slip", "train_clip_loss"), ("simclr", "train_ssl_loss")):
        folder = tmp_path / name
        folder.mkdir()
        row = {"train_loss": 2.5, loss: 1.25, "samples_per_sec": 100.4}
        lines = [json.dumps({**row, "epoch": e, "test_acc1": 10.0 * e}) for e in range(3)]
        (folder / "log.txt").write_text("\n".join(lines) + "\n")
        (folder / "args.json").write_text(json.dumps({"args": {"model": f"{name.upper()}_VITB16"}}))
        linear = {"imagenet": {"accuracy": len(name) * 10.0, "metric": "top1"}}
        (folder / "linear.json").write_text(json.dumps(linear))
    score = {"accuracy": 91.234, "metric": "top1", "interval": [90.0, 92.0]}
    results = {"digits": score, "imagenet": {**score, "accuracy": 41.0}}
    (tmp_path / "slip/results.json").write_text(json.dumps(results))
    examples = {"digits": [["<one>", "seven", 12, picture()], ["two", "three", 3, picture()]]}
    (tmp_path / "slip/examples.json").write_text(json.dumps(examples))
    recall = dict.fromkeys(report.RECALLS, 50.0) | {"images": 9}
    (tmp_path / "slip/retrieval.json").write_text(json.dumps({"coco": recall}))
    return tmp_path


def call(*flags):
    report.main(report.get_args_parser().parse_args([str(flag) for flag in flags]))


def test_tables_and_picture(runs, capsys):
    call(runs / "slip", runs / "simclr", "--markdown", "--picture", runs / "r.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | model | epochs | samples/s | loss |"
    assert lines[2] == "| slip | SLIP_VITB16 | 3 | 100 | clip_loss 1.250 |"
    assert lines[3] == "| simclr | SIMCLR_VITB16 | 3 | 100 | loss 2.500 |"
    assert "| digits | zero-shot | top1 | 91.23 [90.0, 92.0] |  |  |" in lines
    assert "| imagenet | zero-shot | top1 | 41.00 [90.0, 92.0] |  | 42.8 |" in lines
    assert "| imagenet | linear | top1 | 40.00 | **60.00** |  |" in lines
    assert "| coco | slip | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 |" in lines
    assert Image.open(runs / "r.png").size == (1200, 480)
    assert not (runs / "report.html").exists()


def test_bars_stand_beside_what_was_published(runs):
    bars = report.bars_of([report.read_run(runs / "slip"), report.read_run(runs / "simclr")])
    assert bars["imagenet"] == {"slip": 41.0, "published SLIP ViT-B": 42.8}
    assert bars["digits"] == {"slip": 91.234}
    assert bars["imagenet, linear, SLIP_VITB16"] == {"slip": 40.0, "paper": 72.1}
    assert bars["imagenet, linear, SIMCLR_VITB16"] == {"simclr": 60.0, "paper": 64.0}
    assert len(report.PUBLISHED) == 26


def test_the_page_stands_alone_and_is_escaped(runs):
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")
    page = (runs / "r.html").read_text()
    assert "<one>" not in page and "&lt;one&gt;</b> taken for <b>seven</b>, 12 x" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    for title in ("Runs", "Training", "Accuracy", "Retrieval", "Most confused classes", "Settings"):
        assert f"<h2>{title}</h2>" in page
    call(runs / "simclr", "--output", runs / "r.html")  # what is absent is left out
    assert "Retrieval" not in (runs / "r.html").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
def test_the_page_in_a_browser(runs):
    """Laid out without a word on the console, nothing wider than the window, no broken picture."""
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")
    probe = (
        "<script>addEventListener('load', () => { const d = document; d.title = JSON.stringify("
        "[d.documentElement.scrollWidth <= innerWidth,"
        "[...d.images].every(i => i.complete && i.naturalWidth > 0), d.images.length,"
        "d.querySelectorAll('table').length, d.querySelectorAll('b').length]) })</script>"
    )
    (runs / "probe.html").write_text((runs / "r.html").read_text() + probe)
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    common += [f"--user-data-dir={runs}/profile", "--window-size=1200,1600", "--hide-scrollbars"]
    seen = subprocess.run(
        [*common, "--dump-dom", f"file://{runs}/probe.html"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    title = seen.stdout.partition("<title>")[2].partition("</title>")[0]
    assert json.loads(title) == [True, True, 4, 3, 5], seen.stderr
    shot = subprocess.run(
        [*common, f"--screenshot={runs}/page.png", f"file://{runs}/r.html"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "CONSOLE" not in seen.stderr + shot.stderr
    pixels = np.asarray(Image.open(runs / "page.png").convert("L"))
    assert pixels.shape == (1600, 1200)
    for part in np.array_split(pixels[:1200], 6):  # something is drawn all down the page
        assert (part < 200).mean() > 0.001


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("results.json", '{"digits": 5}', "holds no results of this code"),
        ("linear.json", "[1]", "holds no results of this code"),
        ("retrieval.json", '{"coco": {"accuracy": 5}}', "holds no results of this code"),
        ("examples.json", '{"digits": [["a", "b", 1, "\\"><script>"]]}', "holds no examples"),
        ("results.json", '{"digits": {"accuracy": 1e5, "interval": null}}', "holds no results"),
        ("results.json", f'{{"digits": {{"accuracy": 1{"0" * 400}}}}}', "holds no results"),
        ("results.json", '{"\\ud800": {"accuracy": 5}}', "hold what cannot be written"),
        ("retrieval.json", '{"coco": {"image_to_text_recall1": 5}}', "holds no results"),
        ("args.json", "{", "args.json"),
        ("args.json", "[" * 10**5, "args.json"),
        ("log.txt", '{"epoch": 0, "train_loss": "x"}', "log.txt is no log of this code: epoch 0"),
        ("log.txt", '{"epoch": 0, "samples_per_sec": [1]}', "is no log of this code"),
        ("log.txt", '{"epoch": 0, "test_acc1": null}', "is no log of this code"),
        ("log.txt", f'{{"epoch": 1{"0" * 400}}}', "is no log of this code"),
    ],
)
def test_foreign_files_are_told(runs, name, text, match):
    (runs / "slip" / name).write_text(text)
    with pytest.raises(InputError, match=match):
        report.read_run(runs / "slip")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["log.txt", "args.json", "results.json", "linear.json"])
def test_what_is_no_file_is_told(runs, name, make):
    (runs / "slip" / name).unlink()
    make(runs / "slip" / name)
    with pytest.raises(InputError, match=f"{name}: it is no regular file"):
        report.read_run(runs / "slip")


@pytest.mark.parametrize("text", ["[]", '{"args": 5}', '{"args": {"model": [1]}}', "5", "null"])
def test_settings_of_another_kind_do_no_harm(runs, text):
    (runs / "slip/args.json").write_text(text)
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is no run: it holds neither a finished epoch nor res"):
        report.read_run(tmp_path)
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(InputError, match="is no run"):
        report.read_run(tmp_path)
