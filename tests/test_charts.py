"""Curves of several sets and of held-out pairs, and accuracy under shift, in report.py's page."""

import json

import pytest

import charts
import report
from utils import InputError

PAIRS = {f"val_{key}": 10.0 for key in (*report.RECALLS, *report.RANKS)}


def write_run(folder, epochs, sets=("imagenet",), **extra):
    """A run whose log has so many rows; `extra` are functions of the epoch."""
    folder.mkdir()
    rows = [
        {"epoch": e, "train_loss": 3.0, **{key: make(e) for key, make in extra.items()}}
        for e in range(epochs)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"args": {"model": "CLIP_VITB16", "val_dataset": list(sets)}}
    (folder / "args.json").write_text(json.dumps(settings))
    return folder


def page_of(*folders):
    output = folders[0].parent / "r.html"
    report.main(report.get_args_parser().parse_args([*map(str, folders), "--output", str(output)]))
    return output.read_text()


def test_curves_of_averaged_weights_are_named(tmp_path):
    numbers = {"test_acc1": lambda e: 1.0, "ema_test_acc1": lambda e: 2.0 + e}
    numbers |= {"ema_test_imagenet_r_acc1": lambda e: 3.0, "ema_val_loss": lambda e: 0.5}
    runs = [report.read_run(write_run(tmp_path / "run", 2, **numbers))]
    losses, accuracies = charts.draw_curves(runs).axes
    label = "run: held-out pairs, averaged weights"
    assert lines_of(losses)[label] == [(1, 0.5), (2, 0.5)]
    assert lines_of(accuracies) == {
        "run: imagenet": [(1, 1.0), (2, 1.0)],
        "run: imagenet, averaged weights": [(1, 2.0), (2, 3.0)],
        "run: imagenet_r, averaged weights": [(1, 3.0), (2, 3.0)],
    }


@pytest.fixture
def shifted(tmp_path):
    numbers = {"test_acc1": lambda e: 10.0 * e, "test_imagenet_r_acc1": lambda e: 5.0 * e}
    numbers |= {key: lambda e, value=value: value + e for key, value in PAIRS.items()}
    numbers["val_loss"] = lambda e: 2.0 + e
    return write_run(tmp_path / "shifted", 3, ("imagenet", "imagenet_r"), **numbers)


def lines_of(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_curves_of_all_that_was_validated(shifted, tmp_path):
    plain = write_run(tmp_path / "plain", 2, test_acc1=lambda e: 7.0)
    runs = [report.read_run(folder) for folder in (shifted, plain)]
    losses, accuracies, recalls = charts.draw_curves(runs).axes
    assert lines_of(losses)["shifted: held-out pairs"] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert lines_of(accuracies) == {
        "shifted: imagenet": [(1, 0.0), (2, 10.0), (3, 20.0)],
        "shifted: imagenet_r": [(1, 0.0), (2, 5.0), (3, 10.0)],
        "plain: imagenet": [(1, 7.0), (2, 7.0)],
    }
    recall = [(1, 10.0), (2, 11.0), (3, 12.0)]
    assert lines_of(recalls) == {
        "shifted: image to text": recall,
        "shifted: text to image": recall,
    }
    assert len({line.get_color() for line in accuracies.lines}) == 2  # one for each run
    assert len(charts.draw_curves(runs[1:]).axes) == 2


def test_held_out_pairs_are_a_row_of_the_table(shifted, capsys):
    """The latest, with ranks, of which the least is the best; older results have none."""
    other = write_run(shifted.parent / "other", 1, **{k: lambda e: 9.0 for k in PAIRS})
    old = {"coco": dict.fromkeys(report.RECALLS, 50.0)}
    (other / "retrieval.json").write_text(json.dumps(old))
    page_of(shifted, other)
    lines = capsys.readouterr().out.splitlines()
    best, worst = "**12.00** | **12.00** | **12.00**", "12.00 | 12.00"
    assert f"| held-out pairs | shifted | {' | '.join([best, worst] * 2)} |" in lines
    best, worst = "9.00 | 9.00 | 9.00", "**9.00** | **9.00**"
    assert f"| held-out pairs | other | {' | '.join([best, worst] * 2)} |" in lines
    row = "50.00 | 50.00 | 50.00 |  | "
    assert f"| coco | other | {row} | {row} |" in lines


def test_accuracy_under_shift_stands_against_imagenets(shifted, tmp_path):
    assert "Accuracy under shift" in page_of(shifted)
    run = report.read_run(shifted)
    assert charts.shift_points(run, "imagenet_r") == [(0.0, 0.0), (10.0, 5.0), (20.0, 10.0)]
    results = {name: {"accuracy": x} for name, x in (("imagenet", 21.0), ("imagenet_a", 4.0))}
    (shifted / "results.json").write_text(json.dumps(results))
    run = report.read_run(shifted)
    assert charts.shift_points(run, "imagenet_a") == [(21.0, 4.0)]
    (axes,) = charts.draw_robustness([run], {"shifted": "C0"}).axes
    labels = [text.get_text() for text in axes.get_legend().texts]
    assert labels == ["shifted: imagenet_r", "shifted: imagenet_a"]
    marked = lines_of(axes)
    assert marked[labels[0]] == [(20.0, 10.0)] and marked[labels[1]] == [(21.0, 4.0)]

    # Without ImageNet there is nothing to compare with; another set may be the log's first.
    alone = write_run(tmp_path / "alone", 1, ("imagenet_r",), test_acc1=lambda e: 7.0)
    assert charts.draw_robustness([report.read_run(alone)], {"alone": "C0"}) is None
    assert "Accuracy under shift" not in page_of(alone)
    numbers = {"test_acc1": lambda e: 7.0, "test_imagenet_acc1": lambda e: 9.0}
    both = write_run(tmp_path / "both", 1, ("imagenet_r", "imagenet"), **numbers)
    assert charts.shift_points(report.read_run(both), "imagenet_r") == [(9.0, 7.0)]


@pytest.mark.parametrize("key", ["test_a_acc1", "val_loss", "val_image_to_text_recall1"])
def test_numbers_that_cannot_be_drawn(tmp_path, key):
    folder = write_run(tmp_path / "a", 1, **{key: lambda e: "x"})
    with pytest.raises(InputError, match="log.txt is no log of this code: epoch 0; remove it"):
        report.read_run(folder)


def test_ranks_that_are_no_numbers(tmp_path):
    folder = write_run(tmp_path / "a", 1)
    scores = dict.fromkeys(report.RECALLS, 1.0) | {"image_to_text_mean_rank": "x"}
    (folder / "retrieval.json").write_text(json.dumps({"coco": scores}))
    with pytest.raises(InputError, match="retrieval.json holds no results of this code"):
        report.read_run(folder)


@pytest.mark.parametrize("names", [None, "imagenet", [], {}, 3, [3], ["imagenet"]])
def test_settings_of_any_kind_name_a_first_set_or_none(names):
    """A string is that of a run from before several sets could be named."""
    expected = "imagenet" if names in ("imagenet", ["imagenet"]) else ""
    assert charts.first_set({"flags": {"val_dataset": names}}) == expected
