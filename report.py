"""Report of one or several runs: an HTML page that stands alone, and tables in Markdown.

    python report.py runs/slip runs/clip --output report.html
    python report.py runs/slip runs/clip --markdown --picture curves.png

Reads log.txt, args.json, results.json, examples.json, linear.json, logistic.json, knn-*.json,
finetune*.json and retrieval.json, which main.py and the evaluations write to each folder.
"""

import base64
import functools
import glob
import json
import os
import re
from collections import namedtuple
from itertools import chain
from pathlib import Path

import jinja2

import utils
from charts import (
    WAYS,
    choose_colours,
    draw_bars,
    draw_curves,
    draw_robustness,
    get_loss_key,
    in_order,
    printable,
    to_image,
)
from infra import distributed, logger
from utils import InputError

PUBLISHED = Path(__file__).with_name("published.json")
TEMPLATE = Path(__file__).with_name("report_template.html")
CLASSIFIERS = ("linear", "logistic", "knn-*", "finetune*")  # result files, trained on labels
# Shown of a log.
LOGGED = re.compile("epoch|samples_per_sec|train_(clip_)?loss|(ema_)?(test_(.+_)?acc1|val_.+)")
BASE64 = re.compile("[A-Za-z0-9+/]+=*")
RECALLS = [f"{way}_recall{k}" for way in WAYS for k in (1, 5, 10)]
RANKS = [f"{way}_{kind}_rank" for way in WAYS for kind in ("mean", "median")]  # new results have
KINDS = ("zero-shot", "linear", "finetune")  # evaluations that have published ImageNet figures

# Names of columns by the heading above them ("" for none), and rows of str and Score cells.
Table = namedtuple("Table", "columns rows")
Score = namedtuple("Score", "number interval is_best")  # interval: " [low, high]" or ""


def are_numbers(values):
    """True if all can be drawn: JSON has integers that exceed every float."""
    return all(isinstance(x, float) or (isinstance(x, int) and abs(x) < 1e30) for x in values)


def is_score(row, keys):
    """True if a result has a number under each key, and an interval of two numbers or none."""
    interval = row.get("interval", [0.0, 0.0])
    numbers = [*map(row.get, keys), *(interval if isinstance(interval, list) else [None])]
    return are_numbers(numbers) and len(numbers) == len(keys) + 2


def read_optional(path, kind):
    """The parsed JSON file, {} if it is absent."""
    return utils.read_json(path, kind) if os.path.exists(path) else {}


def read_scores(path, keys=("accuracy",)):
    """Read a result file, {set: {key: number}}; {} if it is absent."""
    table = read_optional(path, "results")
    rows = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(row, dict) and is_score(row, keys) for row in rows):
        raise InputError(f"{path} holds no results of this code; remove it")
    return table


def read_evaluations(folder):
    """Read the scores of a run: {"zero-shot" or stem of the result file: {set: result}}."""
    found = [glob.glob(f"{name}.json", root_dir=folder) for name in CLASSIFIERS]
    stems = chain.from_iterable(sorted(Path(name).stem for name in names) for names in found)
    scores = {stem: read_scores(folder / f"{stem}.json") for stem in stems}
    results = read_scores(folder / "results.json")
    return {"zero-shot": results, **scores} if results else scores


def read_examples(path):
    """Read {set: [[true class, predicted class, count, JPEG in base64]]}; {} if it is absent."""
    table = read_optional(path, "examples")
    try:
        for row in chain.from_iterable(table.values()):
            *_, picture = row
            if [type(x) for x in row] != [str, str, int, str] or not BASE64.fullmatch(picture):
                raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no examples of this code; remove it") from error
    return table


def read_epochs(path):
    """Read the rows of a log, and check the numbers that the report shows; [] if it is absent."""
    rows = logger.read_log(path) if os.path.exists(path) else []
    for row in rows:
        if not are_numbers(value for key, value in row.items() if LOGGED.fullmatch(key)):
            raise InputError(f"{path} is no log of this code: epoch {row['epoch']}; remove it")
    return rows


def read_retrieval(path):
    """Read the scores of retrieval, {set: {key: number}}; {} if they are absent."""
    table = read_scores(path, RECALLS)
    if not all(are_numbers(row[key] for key in RANKS if key in row) for row in table.values()):
        raise InputError(f"{path} holds no results of this code; remove it")
    return table


def find_held_out(log):
    """The latest scores of held-out pairs in a log, as a set of retrieval.json."""
    keys = [*RECALLS, *RANKS]
    rows = [row for row in log if all(f"val_{key}" in row for key in keys)]
    return {"held-out pairs": {key: rows[-1][f"val_{key}"] for key in keys}} if rows else {}


def read_run(folder):
    """Read all files of a run; an InputError if there are neither finished epochs nor results."""
    folder = Path(os.path.normpath(folder))
    settings = read_optional(folder / "args.json", "settings")
    flags = settings.get("args") if isinstance(settings, dict) else None
    run = {
        "name": os.path.basename(os.path.abspath(folder)),
        "log": read_epochs(folder / "log.txt"),
        "settings": settings,
        "flags": flags if isinstance(flags, dict) else {},
        "scores": read_evaluations(folder),
        "examples": read_examples(folder / "examples.json"),
        "retrieval": read_retrieval(folder / "retrieval.json"),
    }
    run["retrieval"] |= find_held_out(run["log"])
    if not (run["log"] or run["scores"] or run["retrieval"]):
        raise InputError(
            f"{folder} is no run: it holds neither a finished epoch nor results; check the path"
        )
    try:
        json.dumps(run, indent=1, ensure_ascii=False).encode()
    except (RecursionError, UnicodeEncodeError) as error:
        raise InputError(
            f"{folder}: its files hold values that cannot be written: {error}; correct them"
        ) from error
    return run


def find_fact(run, key):
    """The first value of a key in a run's flags and results, as text; "" if none has it."""
    tables = *run["scores"].values(), run["retrieval"]
    facts = [run["flags"], *chain.from_iterable(table.values() for table in tables)]
    return next((str(row[key]) for row in facts if row.get(key)), "")


@functools.cache
def read_published():
    return utils.read_json(PUBLISHED, "published figures")


def find_published(run):
    """The ImageNet row of a run's model, dataset and epochs, else YFCC15M, 25 epochs; or None."""
    flags, model = run["flags"], find_fact(run, "model")
    own = str(flags.get("dataset")), str(flags.get("epochs"))
    rows = [row for row in read_published()["imagenet_top1"] if row["model"] == model]
    same = [row for row in rows if (row["dataset"], str(row["epochs"])) == own]
    usual = [row for row in rows if row["dataset"] == "yfcc15m" and row["epochs"] in (25, None)]
    return next(iter(same + usual), None)


def describe_published(row):
    epochs = f", {row['epochs']} epochs" if row["epochs"] else ""
    return f"published: {row['model']}, {row['dataset'].upper()}{epochs}"


# ---------------------------------------------------------------------------------------------
# Tables


def summary_table(runs):
    """One row per run: model, epochs, median speed and last loss."""
    rows = []
    for run in runs:
        title = find_fact(run, "model") or os.path.basename(find_fact(run, "checkpoint"))
        row = [run["name"], title, "", "", ""]
        if run["log"]:
            last, key = run["log"][-1], get_loss_key(run)
            speeds = sorted(r.get("samples_per_sec", 0.0) for r in run["log"])
            loss = f"{key.removeprefix('train_')} {last.get(key, float('nan')):.3f}"
            row[2:] = str(last["epoch"] + 1), f"{speeds[len(speeds) // 2]:.0f}", loss
        rows.append(row)
    return Table({"": ["run", "model", "epochs", "samples/s", "loss"]}, rows)


def group_scores(runs):
    """The results of all runs, zero-shot first: {(set, kind): {name of the run: result}}."""
    groups = {}
    for kind in in_order([["zero-shot"], *(run["scores"] for run in runs)]):
        for run in runs:
            for name, result in run["scores"].get(kind, {}).items():
                groups.setdefault((name, kind), {})[run["name"]] = result
    return groups


def score_cell(value, values, interval=None):
    """The cell of a value, marked if it is the best of several."""
    limits = " [{:.1f}, {:.1f}]".format(*interval) if interval else ""
    return Score(f"{value:.2f}", limits, len(values) > 1 and value == max(values))


def score_row(name, kind, results):
    """The row of one set and one kind of evaluation; results: one for each run, or None."""
    found = [result for result in results if result]
    values = [result["accuracy"] for result in found]
    cells = [score_cell(r["accuracy"], values, r.get("interval")) if r else "" for r in results]
    figures = read_published()["zero_shot_by_set"]["accuracy"] if kind == "zero-shot" else {}
    published = f"{figures[name]:.1f}" if name in figures else ""
    return [name, kind, str(found[0].get("metric", "")), *cells, published]


def score_table(runs):
    """One row per set and kind of evaluation, one column per run; None if there are no scores."""
    columns = ["set", "evaluation", "metric", *(run["name"] for run in runs), "published"]
    rows = [
        score_row(name, kind, [results.get(run["name"]) for run in runs])
        for (name, kind), results in group_scores(runs).items()
    ]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table({"": columns}, rows) if rows else None


def retrieval_table(runs):
    """One row per set and run; None if there are no scores."""
    results = [result for run in runs for result in run["retrieval"].values()]
    has_ranks = any(key in result for result in results for key in RANKS)
    kinds = ["recall1", "recall5", "recall10"] + ["mean_rank", "median_rank"] * has_ranks
    keys, rows = [f"{way}_{kind}" for way in WAYS for kind in kinds], []
    for name in in_order(run["retrieval"] for run in runs):
        found = [(run["name"], run["retrieval"][name]) for run in runs if name in run["retrieval"]]
        values = {key: [scores[key] for _, scores in found if key in scores] for key in keys}
        for run_name, scores in found:
            cells = [retrieval_cell(scores.get(key), values[key], key in RANKS) for key in keys]
            rows.append([name, run_name, *cells])
    titles = ["R@1", "R@5", "R@10"] + ["mean rank", "median rank"] * has_ranks
    columns = {"": ["set", "run"], "image to text": titles, "text to image": titles}
    return Table(columns, rows) if rows else None


def retrieval_cell(value, values, is_rank):
    """The cell of a recall, or of a rank, of which the least is the best; "" if there is none."""
    if value is None:
        return ""
    best = min(values) if is_rank else max(values)
    return Score(f"{value:.2f}", "", len(values) > 1 and value == best)


def markdown_cell(cell):
    if isinstance(cell, Score):
        return (f"**{cell.number}**" if cell.is_best else cell.number) + cell.interval
    return printable(cell).replace("|", "\\|")


def to_markdown(table):
    head = [f"{title} {name}".strip() for title, names in table.columns.items() for name in names]
    lines = [head, ["---"] * len(head), *table.rows]
    return "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)


# ---------------------------------------------------------------------------------------------
# Charts


def group_bars(runs):
    """The bars of two charts, zero-shot and trained on labels: {label: {run or published: %}}."""
    scores = group_scores(runs)
    bars = {key: {run: r["accuracy"] for run, r in scores[key].items()} for key in scores}
    by_set = read_published()["zero_shot_by_set"]
    figures = [((s, "zero-shot"), by_set, value) for s, value in by_set["accuracy"].items()]
    for row in filter(None, map(find_published, runs)):
        figures += [(("imagenet", kind), row, row[kind]) for kind in KINDS]
    for key, row, value in figures:
        if key in bars and value is not None:
            bars[key][describe_published(row)] = value
    zero_shot = {name: values for (name, kind), values in bars.items() if kind == "zero-shot"}
    trained = {f"{n}, {kind}": values for (n, kind), values in bars.items() if kind != "zero-shot"}
    return zero_shot, trained


def render_page(runs, tables):
    """The report as one HTML text that fetches nothing, with every name escaped."""
    charts = group_bars(runs)
    colours = choose_colours(runs, charts)
    figures = [draw_curves(runs), *(draw_bars(chart, colours) for chart in charts)]
    figures.append(draw_robustness(runs, colours))
    pictures = [f and base64.b64encode(to_image(f, format="svg")).decode() for f in figures]
    shown = [(run["name"], run["settings"]) for run in runs if run["settings"]]
    settings = [(name, json.dumps(value, indent=1)) for name, value in shown]
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), **options)
    return template.render(runs=runs, tables=tables, pictures=pictures, settings=settings)


def write(flag, path, data):
    """Write bytes to the path that the user gave with a flag."""
    try:
        utils.write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}; choose another") from error


def write_picture(runs, path):
    """Write the training curves in the format that the ending of the path names."""
    figure = draw_curves(runs)
    if figure is None:
        raise InputError(f"--picture {path}: no run has a finished epoch to draw; omit the flag")
    formats, ending = figure.canvas.get_supported_filetypes(), os.path.splitext(path)[1]
    if ending.lower()[1:] not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise InputError(f"--picture {path}: unknown ending {ending!r}; choose from {known}")
    write("--picture", path, to_image(figure, format=ending.lower()[1:], dpi=120))


def get_args_parser():
    parser = utils.ArgumentParser("report.py", "Report of runs")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", help="HTML file to write; report.html unless --markdown is set")
    parser.add_argument("--markdown", action="store_true", help="only print the tables in Markdown")
    parser.add_argument("--picture", help="image file for the training curves, such as curves.png")
    return parser


def main(args):
    runs = [read_run(folder) for folder in args.runs]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [{**run, "name": folder} for run, folder in zip(runs, args.runs, strict=True)]

    tables = summary_table(runs), score_table(runs), retrieval_table(runs)
    print("\n\n".join(to_markdown(table) for table in tables if table))

    if args.picture:
        write_picture(runs, args.picture)
        print(f"\nloss and accuracy per epoch: {args.picture}")

    if args.output or not args.markdown:
        output = args.output or "report.html"
        write("--output", output, render_page(runs, tables).encode())
        print(f"\nreport: {output}")


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
