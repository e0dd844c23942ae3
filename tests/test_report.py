"""report.py: tables, pictures, published figures, the page in a browser, and malformed folders."""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

import charts
import report
import transforms
from utils import InputError


def picture():
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


USUAL = "published: SLIP_VITB16, YFCC15M, 25 epochs"


def test_published_figures():
    table = report.read_published()
    rows = {(r["dataset"], r["epochs"], r["model"]): r for r in table["imagenet_top1"]}
    keys = ["dataset", "epochs", "model", *report.KINDS]
    assert len(table["imagenet_top1"]) == len(rows) == 20
    assert all(list(row) == keys for row in rows.values())
    pinned = {
        ("yfcc15m", 25, "CLIP_VITS16"): [32.7, 59.3, 78.2],
        ("yfcc15m", 25, "SLIP_VITB16"): [42.8, 72.1, 82.6],
        ("yfcc15m", 25, "SIMCLR_VITL16"): [None, 66.7, 84.0],
        ("yfcc15m", 100, "SLIP_VITL16"): [47.9, 75.1, 84.8],
        ("cc12m", 35, "SLIP_VITB16"): [40.7, 73.7, 83.1],
        ("yfcc15m", None, "CLIP_RN50"): [34.6, None, None],
    }
    assert {key: [rows[key][kind] for kind in report.KINDS] for key in pinned} == pinned
    # Sums catch a slip of a digit in any other row.
    sums = [sum(row[kind] or 0 for row in rows.values()) for kind in report.KINDS]
    assert sums == pytest.approx([653.1, 1294.4, 1556.5])

    by_set = table["zero_shot_by_set"]
    assert report.describe_published(by_set) == USUAL
    scores = by_set["accuracy"]
    assert len(scores) == 26 and sum(scores.values()) == pytest.approx(988.6)
    assert (scores["food101"], scores["mnist"], scores["kitti_distance"]) == (59.5, 9.8, 34.0)
    assert scores["imagenet"] == rows["yfcc15m", 25, "SLIP_VITB16"]["zero-shot"]
    assert set(table["sources"]) == set(table) - {"about", "sources"}
    assert "arXiv:2112.12750" in table["sources"]["imagenet_top1"]
    assert "microsoft/A-CLIP" in table["sources"]["zero_shot_by_set"]


def test_bars_stand_beside_published_ones(runs):
    zero_shot, trained = report.group_bars([report.read_run(runs / n) for n in ("slip", "simclr")])
    assert zero_shot == {"digits": {"slip": 91.234}, "imagenet": {"slip": 41.0, USUAL: 42.8}}
    other = "published: SIMCLR_VITB16, YFCC15M, 25 epochs"
    assert trained == {"imagenet, linear": {"slip": 40.0, "simclr": 60.0, USUAL: 72.1, other: 64.0}}


def test_two_runs_of_one_model_have_a_bar_each(runs):
    (runs / "simclr/args.json").write_text((runs / "slip/args.json").read_text())
    _, trained = report.group_bars([report.read_run(runs / n) for n in ("slip", "simclr")])
    assert trained == {"imagenet, linear": {"slip": 40.0, "simclr": 60.0, USUAL: 72.1}}


@pytest.mark.parametrize(
    "model, dataset, epochs, figures, label",
    [
        ("SLIP_VITB16", "yfcc15m", 100, (45.0, 73.6, 83.4), "SLIP_VITB16, YFCC15M, 100 epochs"),
        ("SLIP_VITL16", "yfcc15m", 50, (47.4, 75.8, 84.7), "SLIP_VITL16, YFCC15M, 50 epochs"),
        ("CLIP_VITB16", "cc3m", 40, (17.1, 53.3, 79.5), "CLIP_VITB16, CC3M, 40 epochs"),
        ("SLIP_VITB16", "cc12m", 35, (40.7, 73.7, 83.1), "SLIP_VITB16, CC12M, 35 epochs"),
        ("CLIP_RN50", "yfcc15m", 32, (34.6, None, None), "CLIP_RN50, YFCC15M"),
        # Without a row of these epochs or dataset: YFCC15M, 25 epochs, and the label says so.
        ("SLIP_VITS16", "cc12m", 35, (38.3, 66.4, 80.3), "SLIP_VITS16, YFCC15M, 25 epochs"),
        ("CLIP_VITL16", "yfcc15m", 7, (40.4, 70.5, 81.0), "CLIP_VITL16, YFCC15M, 25 epochs"),
        ("SIMCLR_VITB16", [], {}, (None, 64.0, 82.5), "SIMCLR_VITB16, YFCC15M, 25 epochs"),
        ("SLIP_VITTINY8", "yfcc15m", 25, None, None),
    ],
)
def test_the_published_row_of_a_run(runs, model, dataset, epochs, figures, label):
    settings = {"args": {"model": model, "dataset": dataset, "epochs": epochs}}
    (runs / "slip/args.json").write_text(json.dumps(settings))
    run = report.read_run(runs / "slip")
    row = report.find_published(run)
    assert (row and tuple(row[kind] for kind in report.KINDS)) == figures
    assert label is None or report.describe_published(row) == f"published: {label}"
    if figures and figures[0]:
        assert report.group_bars([run])[0]["imagenet"][f"published: {label}"] == figures[0]


def test_a_folder_without_settings_is_named_by_its_results(runs, capsys):
    (runs / "slip/args.json").unlink()
    (runs / "slip/log.txt").unlink()
    results = {"imagenet": {"accuracy": 45.0, "checkpoint": "there/slip_base_100ep.pt"}}
    (runs / "slip/results.json").write_text(json.dumps(results))
    call(runs / "slip", "--output", runs / "r.html")
    assert "<td>slip_base_100ep.pt</td>" in (runs / "r.html").read_text()
    results["imagenet"]["model"] = "SLIP_VITB16"
    (runs / "slip/results.json").write_text(json.dumps(results))
    call(runs / "slip", "--output", runs / "r.html")
    assert "<td>SLIP_VITB16</td>" in (runs / "r.html").read_text()
    assert USUAL in report.group_bars([report.read_run(runs / "slip")])[1]["imagenet, linear"]


def test_the_page_stands_alone_and_is_escaped(runs):
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")
    page = (runs / "r.html").read_text()
    assert "<one>" not in page and "&lt;one&gt;</b> taken for <b>seven</b>, 12&nbsp;x" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    titles = "Runs|Training|Accuracy|Zero-shot by set|Trained on labels, by set|Retrieval"
    for title in f"{titles}|Most confused classes|Settings".split("|"):
        assert f"<h2>{title}</h2>" in page
    call(runs / "simclr", "--output", runs / "r.html")  # absent parts are left out
    assert "Retrieval" not in (runs / "r.html").read_text()


class Elements(HTMLParser):
    """The names of a page's elements and attributes, and the addresses of its images."""

    def __init__(self, page):
        super().__init__()
        self.names, self.images = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *dict(attrs)}
        self.images += [dict(attrs)["src"]] if tag == "img" else []


HOSTILE = [
    "</td></pre></style><script>alert(1)<",
    "\"><img src=x onerror='alert(1)'>",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "&lt;b&gt;&amp;",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(runs, name):
    """In each place that takes a name: run, set, class, metric, model, settings and result file."""
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")
    known = Elements((runs / "r.html").read_text()).names
    slip, file_name = runs / "slip", name.replace("/", "|")
    slip.rename(slip := runs / file_name)
    result = {"accuracy": 5.0, "metric": name, "interval": [4.0, 6.0]}
    (slip / "results.json").write_text(json.dumps({name: result}))
    (slip / f"knn-{file_name}.json").write_text(json.dumps({name: result}))
    (slip / "retrieval.json").write_text(json.dumps({name: dict.fromkeys(report.RECALLS, 5.0)}))
    (slip / "examples.json").write_text(json.dumps({name: [[name, name, 2, picture()]]}))
    (slip / "args.json").write_text(json.dumps({"args": {"model": name, name: name}}))
    call(slip, runs / "simclr", "--output", runs / "r.html")
    page = (runs / "r.html").read_text()
    elements = Elements(page)
    assert elements.names <= known
    assert len(elements.images) == 4
    for image in elements.images:
        assert re.fullmatch("data:image/(jpeg|svg.xml);base64,[A-Za-z0-9+/]+=*", image)
    assert page.count(escape(name)) >= 8


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
def test_the_page_in_a_browser(runs):
    """Laid out without a word on the console, nothing cut off or scrolled, no broken picture."""
    shutil.copy(runs / "slip/retrieval.json", runs / "simclr")
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")
    probe = (
        "<script>addEventListener('load', () => { const d = document; d.title = JSON.stringify("
        "[d.documentElement.scrollWidth <= innerWidth,"
        "[...d.images].every(i => i.complete && i.naturalWidth > 0), d.images.length,"
        "d.querySelectorAll('table').length, d.querySelectorAll('b').length,"
        "[...d.querySelectorAll('.wide')].every(w => w.scrollWidth <= w.clientWidth)"
        "]) })</script>"
    )
    (runs / "probe.html").write_text((runs / "r.html").read_text() + probe)
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    common += [f"--user-data-dir={runs}/profile", "--hide-scrollbars"]
    for width in (800, 1200):
        seen = subprocess.run(
            [*common, f"--window-size={width},1600", "--dump-dom", f"file://{runs}/probe.html"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        title = seen.stdout.partition("<title>")[2].partition("</title>")[0]
        assert json.loads(title) == [True, True, 5, 3, 17, True], seen.stderr
    shot = subprocess.run(
        [*common, "--window-size=1200,1600", f"--screenshot={runs}/page.png", f"file://{runs}/r.html"],
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
        ("results.json", '{"\\ud800": {"accuracy": 5}}', "hold values that cannot be written"),
        ("retrieval.json", '{"coco": {"image_to_text_recall1": 5}}', "holds no results"),
        ("args.json", "{", "args.json"),
        ("args.json", "[" * 10**5, "args.json"),
        ("log.txt", '{"epoch": 0, "train_loss": "x"}', "log.txt is no log of this code: epoch 0"),
        ("log.txt", '{"epoch": 0, "samples_per_sec": [1]}', "is no log of this code"),
        ("log.txt", '{"epoch": 0, "test_acc1": null}', "is no log of this code"),
        ("log.txt", f'{{"epoch": 1{"0" * 400}}}', "is no log of this code"),
    ],
)
def test_foreign_files_are_rejected(runs, name, text, match):
    (runs / "slip" / name).write_text(text)
    with pytest.raises(InputError, match=match):
        report.read_run(runs / "slip")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["log.txt", "args.json", "results.json", "linear.json"])
def test_files_that_are_not_regular_are_rejected(runs, name, make):
    (runs / "slip" / name).unlink()
    make(runs / "slip" / name)
    with pytest.raises(InputError, match=f"{name}: it is no regular file"):
        report.read_run(runs / "slip")


@pytest.mark.parametrize("text", ["[]", '{"args": 5}', '{"args": {"model": [1]}}', "5", "null"])
def test_settings_of_another_kind_do_no_harm(runs, text):
    (runs / "slip/args.json").write_text(text)
    call(runs / "slip", runs / "simclr", "--output", runs / "r.html")


@pytest.mark.parametrize("name", ["_$\\frac{$ a|b", "a\x01\nb<b>&amp; $x$"])
def test_names_of_any_kind_are_drawn(runs, name, capsys):
    """A folder and sets so called: no formula, no markup, no row or column more, no lost legend."""
    os.rename(runs / "slip", runs / name)
    results = json.loads((runs / name / "results.json").read_text())
    (runs / name / "results.json").write_text(json.dumps({**results, name: results["digits"]}))
    (runs / name / "linear.json").write_text(json.dumps({name: {"accuracy": 5.0}}))
    call(runs / name, "--output", runs / "r.html")
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [6] * 3
    pictures = re.findall('svg.xml;base64,([^"]+)', (runs / "r.html").read_text())
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture))  # well-formed
    assert len(pictures) == 3
    run = report.read_run(runs / name)
    (axes, _), legends = charts.draw_curves([run]).axes, []
    legends.append(axes.get_legend().texts[0].get_text())
    bars = report.group_bars([run])
    for chart in bars:
        figure = charts.draw_bars(chart, charts.choose_colours([run], bars))
        legends.append(figure.axes[0].get_legend().texts[0].get_text())
    shown = charts.printable(name)
    assert legends == [f"{shown}: clip_loss", shown, shown]


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--output", "absent/r.html"], "--output absent/r.html: No such file or directory; ch"),
        (["--output", "slip"], "--output slip: Is a directory; choose another"),
        (["--picture", "absent/r.png"], "--picture absent/r.png: No such file or directory; ch"),
        (["--picture", "r.foo"], "--picture r.foo: unknown ending '.foo'; choose from .+png"),
        (["--picture", "picture"], "--picture picture: unknown ending ''; choose from"),
    ],
)
def test_unwritable_outputs_are_rejected(runs, monkeypatch, flags, match):
    monkeypatch.chdir(runs)
    with pytest.raises(InputError, match=match):
        call("slip", *flags)
    assert sorted(os.listdir()) == ["simclr", "slip"]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is no run: it holds neither a finished epoch nor res"):
        report.read_run(tmp_path)
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(InputError, match="is no run"):
        report.read_run(tmp_path)
