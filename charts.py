"""The charts of report.py: curves by epoch, bars by set, accuracy under shift; matplotlib figures.

A run is a dict as report.read_run makes it.
"""

import io
import re

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # a set may be called $x$

SHIFTED = {  # sets of ImageNet's classes -> their marker
    "imagenetv2": "o",
    "imagenet_sketch": "s",
    "imagenet_r": "^",
    "imagenet_a": "D",
}
WAYS = {"image_to_text": "-", "text_to_image": "--"}  # directions of retrieval -> their line


def get_loss_key(run):
    """The loss to compare: a SLIP and a CLIP run share the CLIP loss."""
    return "train_clip_loss" if "train_clip_loss" in run["log"][0] else "train_loss"


def printable(text):
    return "".join(c if c.isprintable() else " " for c in text)


def in_order(tables):
    """The keys of several dicts, each once."""
    return list(dict.fromkeys(key for table in tables for key in table))


def first_set(run):
    """The name of the set whose accuracy a log has as test_acc1; "" if its settings are absent."""
    names = run["flags"].get("val_dataset")
    names = names if isinstance(names, list) else [names]
    return names[0] if names and isinstance(names[0], str) else ""


def curve(run, key):
    """[(epoch, number)] of the rows of a log that have a key; epochs count from 1."""
    return [(row["epoch"] + 1, row[key]) for row in run["log"] if key in row]


def accuracy_curves(run):
    """{label: curve} of the labelled sets of a log; runs may have another first set each."""
    curves = {}
    for key in in_order(run["log"]):
        if found := re.fullmatch("(ema_)?test_(?:(.+)_)?acc1", key):
            parts = [found[2] or first_set(run), "averaged weights" if found[1] else ""]
            label = ", ".join(filter(None, parts))
            curves[f"{run['name']}: {label}" if label else run["name"]] = curve(run, key)
    return curves


# ---------------------------------------------------------------------------------------------
# By epoch


def draw_curves(runs):
    """Loss, zero-shot accuracy and R@1 of held-out pairs per epoch; None if nothing was logged.

    A colour for each run. R@1 has a place only if a run has it.
    """
    runs = [run for run in runs if run["log"]]
    if not runs:
        return None
    has_pairs = any(curve(run, f"val_{way}_recall1") for run in runs for way in WAYS)
    figure = Figure(figsize=(14 if has_pairs else 10, 4), layout="constrained")
    losses, accuracies, *recalls = figure.subplots(1, 3 if has_pairs else 2)
    for i, run in enumerate(runs):
        draw_losses(losses, run, f"C{i}")
        for j, (label, points) in enumerate(accuracy_curves(run).items()):
            draw_line(accuracies, points, label, f"C{i}", ("-", "--", ":", "-.")[j % 4])
        for way, style in WAYS.items() if has_pairs else ():
            label = f"{run['name']}: {way.replace('_', ' ')}"
            draw_line(recalls[0], curve(run, f"val_{way}_recall1"), label, f"C{i}", style)
    losses.set(xlabel="epoch", ylabel="loss", title="Loss")
    accuracies.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, 100), title="Zero-shot accuracy")
    for axes in recalls:
        axes.set(xlabel="epoch", ylabel="R@1 (%)", ylim=(0, 100), title="Held-out pairs")
    for axes in (losses, accuracies, *recalls):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:  # given one by one, as a legend omits labels that begin with "_"
            axes.legend(axes.lines, [line.get_label() for line in axes.lines])
    return figure


def draw_line(axes, points, label, colour, style):
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=printable(label))


def draw_losses(axes, run, colour):
    """The training loss, and that of held-out pairs."""
    key = get_loss_key(run)
    points = [(row["epoch"] + 1, row.get(key, float("nan"))) for row in run["log"]]
    draw_line(axes, points, f"{run['name']}: {key.removeprefix('train_')}", colour, "-")
    draw_line(axes, curve(run, "val_loss"), f"{run['name']}: held-out pairs", colour, "--")
    label = f"{run['name']}: held-out pairs, averaged weights"
    draw_line(axes, curve(run, "ema_val_loss"), label, colour, ":")


# ---------------------------------------------------------------------------------------------
# Accuracy under shift


def shift_points(run, name):
    """[(ImageNet's accuracy, the shifted set's)] of a run, epoch by epoch, the results last."""

    def key(dataset):
        return "test_acc1" if dataset == first_set(run) else f"test_{dataset}_acc1"

    keys, results = (key("imagenet"), key(name)), run["scores"].get("zero-shot", {})
    points = [tuple(row[k] for k in keys) for row in run["log"] if all(k in row for k in keys)]
    if "imagenet" in results and name in results:
        points.append((results["imagenet"]["accuracy"], results[name]["accuracy"]))
    return points


def draw_robustness(runs, colours):
    """Accuracy on sets of ImageNet's classes against that on ImageNet; None without both.

    A line joins the epochs of a run, the last has a marker. On the dashed line a shift costs
    nothing.
    """
    found = {(run["name"], name): shift_points(run, name) for run in runs for name in SHIFTED}
    found = {key: points for key, points in found.items() if points}
    if not found:
        return None
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color="0.6", linestyle="--")
    for (run, name), points in found.items():
        axes.plot(*zip(*points, strict=True), color=colours[run], alpha=0.5)
        marker = {"marker": SHIFTED[name], "color": colours[run], "linestyle": "none"}
        axes.plot(*points[-1], **marker, label=printable(f"{run}: {name}"))
    axes.set(xlabel="imagenet, top-1 (%)", ylabel="under shift, top-1 (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    marked = [line for line in axes.lines if line.get_linestyle() == "None"]
    axes.legend(marked, [line.get_label() for line in marked])
    return figure


# ---------------------------------------------------------------------------------------------
# By set


def choose_colours(runs, charts):
    """A colour for each run, greys for published figures: {name: colour}."""
    colours = {run["name"]: f"C{i}" for i, run in enumerate(runs)}
    names = in_order(bars for chart in charts for bars in chart.values())
    published = [name for name in names if name not in colours]
    return colours | {name: str(0.5 + 0.12 * (i % 4)) for i, name in enumerate(published)}


def draw_bars(groups, colours):
    """Groups of horizontal bars, the legend in the order of the colours; None without groups."""
    if not groups:
        return None
    height = 1.2 + 0.22 * sum(map(len, groups.values())) + 0.1 * len(groups)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    y, ticks, handles = 0.0, [], {}
    for values in groups.values():
        ticks.append(y + (len(values) - 1) / 2)
        for name, value in values.items():
            handles[name] = axes.barh(y, value, 0.9, color=colours[name])
            axes.text(value + 0.5, y, f"{value:.1f}", va="center", fontsize=8)
            y += 1
        y += 0.5
    axes.set(xlabel="accuracy (%)", xlim=(0, 105), yticks=ticks)
    axes.set_yticklabels(map(printable, groups))
    axes.invert_yaxis()
    axes.margins(y=0.02)
    names = [name for name in colours if name in handles]
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2, "frameon": False}
    axes.legend([handles[name] for name in names], list(map(printable, names)), **above)
    return figure


def to_image(figure, **options):
    file = io.BytesIO()
    figure.savefig(file, **options)
    return file.getvalue()
