"""A report of one or several runs: an HTML page that stands alone, or a table in Markdown.

    python report.py runs/slip runs/clip --output report.html
    python report.py runs/slip runs/clip --markdown --picture curves.png

Reads what main.py and the evaluations left in each folder: log.txt, args.json, results.json,
examples.json, linear.json, logistic.json, knn-*.json, finetune*.json and retrieval.json.
"""

import base64
import functools
import glob
import io
import json
import os
import re
from itertools import chain, groupby
from pathlib import Path

import matplotlib

import runlog
import utils
from utils import InputError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

plt.rcParams["text.parse_math"] = False  # a set may be called $x$

OTHERS = ("linear", "logistic", "knn-*", "finetune*")  # classifiers trained on labels
LOGGED = re.compile("epoch|samples_per_sec|train_(clip_)?loss|test_acc1")  # what is shown
BASE64 = re.compile("[A-Za-z0-9+/]+=*")
RECALLS = [f"{way}_recall{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]

PUBLISHED = Path(__file__).with_name("published.json")
KINDS = ("zero-shot", "linear", "finetune")  # evaluations that have published ImageNet figures


# ---------------------------------------------------------------------------------------------
# Reading


def are_numbers(values):
    """Whether all can be shown: JSON knows integers that no float can hold."""
    return all(isinstance(x, float) or (isinstance(x, int) and abs(x) < 1e30) for x in values)


def is_score(row, keys):
    interval = row.get("interval", [0.0, 0.0])
    numbers = [*map(row.get, keys), *(interval if isinstance(interval, list) else [None])]
    return are_numbers(numbers) and len(numbers) == len(keys) + 2


def read_scores(path, needs=("accuracy",)):
    """{set: {..., "accuracy": number}} of a result file; {} where there is none."""
    if not os.path.exists(path):
        return {}
    table = utils.read_json(path, "results")
    rows = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(r, dict) and is_score(r, needs) for r in rows):
        raise InputError(f"{path} holds no results of this code; remove it")
    return table


def read_examples(path):
    """{set: [[true class, predicted class, number, base64 of a JPEG]]}; {} where there is none."""
    table = utils.read_json(path, "examples") if os.path.exists(path) else {}
    try:
        for row in chain.from_iterable(table.values()):
            *_, picture = row
            if [type(x) for x in row] != [str, str, int, str] or not BASE64.fullmatch(picture):
                raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no examples of this code; remove it") from error
    return table


def read_epochs(path):
    """The rows of a log; {} where there is none. What a row says of an epoch must be numbers."""
    rows = runlog.read_log(path) if os.path.exists(path) else []
    for row in rows:
        if not are_numbers(value for key, value in row.items() if LOGGED.fullmatch(key)):
            raise InputError(f"{path} is no log of this code: epoch {row['epoch']}; remove it")
    return rows


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def read_run(folder):
    """All that is known of a run. Raises InputError if the folder holds neither log nor results."""
    folder = os.path.normpath(folder)

    def path(name):
        return os.path.join(folder, name)

    others = {
        kind: read_scores(path(f"{kind}.json"))
        for pattern in OTHERS
        for kind in sorted(map(stem, glob.glob(glob.escape(folder) + f"/{pattern}.json")))
    }
    settings = path("args.json")
    run = {
        "name": os.path.basename(os.path.abspath(folder)),
        "log": read_epochs(path("log.txt")),
        "settings": utils.read_json(settings, "settings") if os.path.exists(settings) else {},
        "results": read_scores(path("results.json")),
        "examples": read_examples(path("examples.json")),
        "others": others,
        "retrieval": read_scores(path("retrieval.json"), RECALLS),
    }
    if not (run["log"] or run["results"] or others or run["retrieval"]):
        raise InputError(f"{folder} is no run: it holds neither a finished epoch nor results")
    try:
        json.dumps(run, indent=1, ensure_ascii=False).encode()
    except (RecursionError, UnicodeEncodeError) as error:
        raise InputError(f"{folder}: its files hold what cannot be written: {error}") from error
    return run


def flags_of(run):
    flags = run["settings"].get("args", {}) if isinstance(run["settings"], dict) else {}
    return flags if isinstance(flags, dict) else {}


def model_of(run):
    """The model, by the run's flags or its results; "" where neither names it."""
    return next((str(row["model"]) for row in facts_of(run) if row.get("model")), "")


def title_of(run):
    """The model, or the checkpoint's file where it is not known."""
    files = [str(row["checkpoint"]) for row in facts_of(run) if row.get("checkpoint")]
    return model_of(run) or next(map(os.path.basename, files), "")


def facts_of(run):
    """The run's flags, and its results."""
    tables = run["results"], *run["others"].values(), run["retrieval"]
    return [flags_of(run), *chain.from_iterable(table.values() for table in tables)]


@functools.cache
def read_published():
    return utils.read_json(PUBLISHED, "published figures")


def find_published(run):
    """The ImageNet row of a run's model, dataset and epochs, else YFCC15M, 25 epochs; or None."""
    flags, model = flags_of(run), model_of(run)
    own = str(flags.get("dataset")), str(flags.get("epochs"))
    rows = [row for row in read_published()["imagenet_top1"] if row["model"] == model]
    same = [row for row in rows if (row["dataset"], str(row["epochs"])) == own]
    usual = [row for row in rows if row["dataset"] == "yfcc15m" and row["epochs"] in (25, None)]
    return next(iter(same + usual), None)


def describe_published(row):
    epochs = f", {row['epochs']} epochs" if row["epochs"] else ""
    return f"published: {row['model']}, {row['dataset'].upper()}{epochs}"


def loss_key(run):
    """The loss to compare: a SLIP and a CLIP run share the CLIP loss."""
    return "train_clip_loss" if "train_clip_loss" in run["log"][0] else "train_loss"


def printable(text):
    return "".join(c if c.isprintable() else " " for c in text)


def in_order(tables):
    """The keys of several dicts, each once."""
    return list(dict.fromkeys(key for table in tables for key in table))


# ---------------------------------------------------------------------------------------------
# Tables: lists of rows of texts, the first is the head


def summary_table(runs):
    """A row a run: model, epochs, median speed and last loss."""
    rows = [["run", "model", "epochs", "samples/s", "loss"]]
    for run in runs:
        row = [run["name"], title_of(run), "", "", ""]
        if run["log"]:
            last = run["log"][-1]
            speeds = sorted(r.get("samples_per_sec", 0.0) for r in run["log"])
            loss = f"{loss_key(run)[6:]} {last.get(loss_key(run), float('nan')):.3f}"
            row[2:] = str(last["epoch"] + 1), f"{speeds[len(speeds) // 2]:.0f}", loss
        rows.append(row)
    return rows


def score_table(runs, strong):
    """A row a set and kind of evaluation, a column a run; the best of several runs by strong()."""
    kinds = {"zero-shot": [run["results"] for run in runs]}
    for kind in in_order(run["others"] for run in runs):
        kinds[kind] = [run["others"].get(kind, {}) for run in runs]
    rows = [["set", "evaluation", "metric", *(run["name"] for run in runs), "published"]]
    for kind, tables in kinds.items():
        for name in in_order(tables):
            found = [table.get(name) for table in tables]
            scores = [f["accuracy"] for f in found if f]
            row = [name, kind, next(str(f.get("metric", "")) for f in found if f)]
            for f in found:
                text = f"{f['accuracy']:.2f}" if f else ""
                is_best = f and len(scores) > 1 and f["accuracy"] == max(scores)
                interval = f.get("interval") if f else None
                text = strong(text) if is_best else text
                row.append(text + (" [{:.1f}, {:.1f}]".format(*interval) if interval else ""))
            by_set = read_published()["zero_shot_by_set"]["accuracy"]
            published = by_set.get(name) if kind == "zero-shot" else None
            rows.append([*row, f"{published:.1f}" if published is not None else ""])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return rows if len(rows) > 1 else []


def retrieval_table(runs, strong):
    """A row a set and run."""
    rows = [["set", "run", *(key.replace("_recall", " R@").replace("_", " ") for key in RECALLS)]]
    for name in in_order(run["retrieval"] for run in runs):
        found = [(run["name"], run["retrieval"][name]) for run in runs if name in run["retrieval"]]
        for run_name, scores in found:
            row = [name, run_name]
            for key in RECALLS:
                is_best = len(found) > 1 and scores[key] == max(s[key] for _, s in found)
                row.append(strong(f"{scores[key]:.2f}") if is_best else f"{scores[key]:.2f}")
            rows.append(row)
    return rows if len(rows) > 1 else []


def to_markdown(rows):
    rows = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]] if rows else []
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def to_html(rows):
    """Cells are HTML already. Heads "text R@1", "text R@5" have "text" in a row above, once."""
    head, *body = rows
    above = [(cell.partition(" R@")[0] if " R@" in cell else "") for cell in head]
    groups = [(text, len(list(cells))) for text, cells in groupby(above)]
    first = "".join(f'<th colspan="{span}">{text}</th>' for text, span in groups)
    heads = [cell[len(text) :] for cell, text in zip(head, above, strict=True)]
    lines = [first] * any(above) + ["".join(f"<th>{cell}</th>" for cell in heads)]
    top = "".join(f"<tr>{line}</tr>" for line in lines)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    table = f"<table><thead>{top}</thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide">{table}</div>'


# ---------------------------------------------------------------------------------------------
# Pictures


def draw_curves(runs):
    """Loss and zero-shot accuracy per epoch, a line a run; None where nothing was logged."""
    runs = [run for run in runs if run["log"]]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    legends = {left: {}, right: {}}
    for run in runs:
        epochs, key = [row["epoch"] + 1 for row in run["log"]], loss_key(run)
        losses = [row.get(key, float("nan")) for row in run["log"]]
        legends[left][f"{run['name']}: {key[6:]}"] = left.plot(epochs, losses)[0]
        scored = [(row["epoch"] + 1, row["test_acc1"]) for row in run["log"] if "test_acc1" in row]
        if scored:
            legends[right][run["name"]] = right.plot(*zip(*scored, strict=True))[0]
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    right.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, 100), title="Zero-shot accuracy")
    for axes, lines in legends.items():
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(lines.values(), map(printable, lines))
    return figure


def bars_of(runs):
    """Zero-shot accuracy and that of classifiers trained on labels: {group of bars: {name: %}}."""
    zero_shot, trained, by_set = {}, {}, read_published()["zero_shot_by_set"]
    for name in in_order(run["results"] for run in runs):
        zero_shot[name] = scores_on(name, [(r["name"], r["results"]) for r in runs])
        if name in by_set["accuracy"]:
            zero_shot[name][describe_published(by_set)] = by_set["accuracy"][name]
    for kind in in_order(run["others"] for run in runs):
        tables = [(run["name"], run["others"].get(kind, {})) for run in runs]
        for name in in_order(table for _, table in tables):
            trained[f"{name}, {kind}"] = scores_on(name, tables)
    for row in filter(None, map(find_published, runs)):
        for kind in KINDS:
            bars = (zero_shot | trained).get("imagenet" + f", {kind}" * (kind != "zero-shot"))
            if bars and row[kind] is not None:
                bars[describe_published(row)] = row[kind]
    return zero_shot, trained


def scores_on(name, tables):
    return {run: table[name]["accuracy"] for run, table in tables if name in table}


def colours_of(runs, charts):
    """A colour for each run, greys for what was published."""
    colours = {run["name"]: f"C{i}" for i, run in enumerate(runs)}
    names = in_order(bars for chart in charts for bars in chart.values())
    published = [name for name in names if name not in colours]
    return colours | {name: str(0.5 + 0.12 * (i % 4)) for i, name in enumerate(published)}


def draw_bars(bars, colours):
    """Groups of bars; None without any."""
    if not bars:
        return None
    height = 1.2 + 0.22 * sum(map(len, bars.values())) + 0.1 * len(bars)
    figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
    place, ticks, handles = 0.0, [], {}
    for label, values in bars.items():
        ticks.append((place + (len(values) - 1) / 2, printable(label)))
        for name, value in values.items():
            handles[name] = axes.barh(place, value, 0.9, color=colours[name])
            axes.text(value + 0.5, place, f"{value:.1f}", va="center", fontsize=8)
            place += 1
        place += 0.5
    axes.set(xlabel="accuracy (%)", xlim=(0, 105), yticks=[t for t, _ in ticks])
    axes.set_yticklabels([label for _, label in ticks])
    axes.invert_yaxis()
    axes.margins(y=0.02)
    names = [name for name in colours if name in handles]
    axes.legend(
        [handles[name] for name in names],
        list(map(printable, names)),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
    )
    return figure


def embed(figure, what):
    """A figure as an <img> that holds its picture."""
    if figure is None:
        return ""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="chart" alt="{what}" src="data:image/svg+xml;base64,{data}">'


# ---------------------------------------------------------------------------------------------
# The page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em;
  color: #1c2430; background: #fff }
h1 { font-size: 1.7em } h2 { margin-top: 2em; border-bottom: 1px solid #d5dbe3 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; border-bottom: 1px solid #e6eaf0; text-align: left;
  white-space: nowrap }
thead th { background: #f3f6fa } .chart { width: 100%; height: auto }
.examples { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 130px }
figure img { width: 96px; height: 96px; object-fit: contain; background: #f3f6fa }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere }
pre { background: #f3f6fa; padding: 1em; overflow-x: auto; font-size: 12px }
.note { color: #5a6675 }
@media (max-width: 1000px) { table { font-size: 13px } th, td { padding: .25em .35em } }
"""


def strong(text):
    return f"<b>{text}</b>"


def escaped_names(runs):
    """The runs with what users can name made harmless: file names, sets and models."""
    text = json.dumps(runs)
    return json.loads(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def example_figures(run):
    """The most confused pairs of a run's sets, each with one of its images."""
    parts = []
    for name, pairs in run["examples"].items():
        figures = "".join(
            f'<figure><img alt="" src="data:image/jpeg;base64,{picture}"><figcaption>'
            f"<b>{true}</b> taken for <b>{predicted}</b>, {number}&nbsp;x</figcaption></figure>"
            for true, predicted, number, picture in pairs
        )
        if figures:
            parts.append(f'<h3>{run["name"]}: {name}</h3><div class="examples">{figures}</div>')
    return "".join(parts)


def page(runs):
    """The report as one HTML text; nothing in it is fetched."""
    bars = bars_of(runs)
    colours = colours_of(runs, bars)
    curves = embed(draw_curves(runs), "loss and accuracy per epoch")
    charts = [embed(draw_bars(chart, colours), "accuracy by set") for chart in bars]
    runs = escaped_names(runs)
    scores, recalls = score_table(runs, strong), retrieval_table(runs, strong)
    confused = "".join(example_figures(run) for run in runs)
    settings = "".join(
        f"<details><summary>{run['name']}</summary><pre>{json.dumps(run['settings'], indent=1)}"
        "</pre></details>"
        for run in runs
        if run["settings"]
    )
    intervals = (
        "Accuracy in percent; 95% bootstrap intervals of the images in brackets; the best run in "
        "bold. Published: SLIP ViT-B after 25 epochs of YFCC15M."
    )
    sections = [
        ("Runs", to_html(summary_table(runs))),
        ("Training", curves),
        ("Accuracy", scores and f'<p class="note">{intervals}</p>{to_html(scores)}'),
        ("Zero-shot by set", charts[0]),
        ("Trained on labels, by set", charts[1]),
        ("Retrieval", recalls and to_html(recalls)),
        ("Most confused classes", confused),
        ("Settings", settings),
    ]
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections if text)
    title = "Report: " + ", ".join(run["name"] for run in runs)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )


def get_args_parser():
    parser = utils.ArgumentParser("report.py", "A report of runs")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", help="HTML file to write; by default report.html")
    parser.add_argument("--markdown", action="store_true", help="print the tables, write no page")
    parser.add_argument("--picture", help="file of the training curves to write, .png or .svg, say")
    return parser


def write(flag, path, data):
    try:
        utils.write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}; choose another") from error


def write_picture(runs, path):
    figure, file = draw_curves(runs), io.BytesIO()
    if figure is None:
        raise InputError("--picture: none of the runs has a finished epoch to draw")
    known = figure.canvas.get_supported_filetypes()
    kind = os.path.splitext(path)[1].lower()[1:]
    if kind not in known:
        raise InputError(f"--picture {path}: its ending is none of .{', .'.join(known)}")
    figure.savefig(file, format=kind, dpi=120)
    plt.close(figure)
    write("--picture", path, file.getvalue())


def main(args):
    runs = [read_run(folder) for folder in args.runs]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [{**run, "name": folder} for run, folder in zip(runs, args.runs, strict=True)]
    tables = (
        summary_table(runs),
        score_table(runs, "**{}**".format),
        retrieval_table(runs, "**{}**".format),
    )
    print("\n\n".join(to_markdown(rows) for rows in tables if rows))
    if args.picture:
        write_picture(runs, args.picture)
        print(f"\nloss and accuracy per epoch: {args.picture}")
    if args.output or not args.markdown:
        output = args.output or "report.html"
        write("--output", output, page(runs).encode())
        print(f"\nreport: {output}")


if __name__ == "__main__":
    utils.run(lambda: main(get_args_parser().parse_args()))
