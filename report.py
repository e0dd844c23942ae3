"""A table and a picture of one or several runs, from the files that the scripts left behind.

    python report.py runs/slip runs/clip --picture report.png

Reads log.txt, args.json and, where eval_zeroshot.py wrote one, results.json of each folder.
"""

import os

import matplotlib

import utils
from utils import InputError

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_run(folder):
    """{"name", "log", "settings", "results"} of a run's folder. Raises InputError if it is none."""
    log = os.path.join(folder, "log.txt")
    if not os.path.exists(log):
        raise InputError(f"{folder} is no run: it holds no log.txt")
    rows = utils.read_log(log)
    if not rows:
        raise InputError(f"{log} holds no finished epoch; train on")
    results = os.path.join(folder, "results.json")
    return {
        "name": os.path.basename(os.path.normpath(folder)),
        "log": rows,
        "settings": utils.read_json(os.path.join(folder, "args.json"), "settings"),
        "results": utils.read_json(results, "results") if os.path.exists(results) else {},
    }


def loss_key(run):
    """The loss to compare: a SLIP and a CLIP run share the CLIP loss."""
    return "train_clip_loss" if "train_clip_loss" in run["log"][0] else "train_loss"


def markdown_table(runs):
    """A row a run: model, epochs, median speed, last loss, and the accuracy on each set."""
    sets = list(dict.fromkeys(name for run in runs for name in run["results"]))
    head = ["run", "model", "epochs", "samples/s", "loss", *(f"{name} (%)" for name in sets)]
    rows = [head, ["---"] * len(head)]
    for run in runs:
        last, scores = run["log"][-1], run["results"]
        speeds = sorted(row["samples_per_sec"] for row in run["log"])
        row = [run["name"], run["settings"]["args"]["model"], str(last["epoch"] + 1)]
        row += [f"{speeds[len(speeds) // 2]:.0f}", f"{loss_key(run)[6:]} {last[loss_key(run)]:.3f}"]
        row += [f"{scores[name]['accuracy']:.2f}" if name in scores else "" for name in sets]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(runs, path):
    """Loss and zero-shot accuracy per epoch, a line a run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        epochs = [row["epoch"] + 1 for row in run["log"]]
        key = loss_key(run)
        left.plot(epochs, [row[key] for row in run["log"]], label=f"{run['name']}: {key[6:]}")
        scored = [(row["epoch"] + 1, row["test_acc1"]) for row in run["log"] if "test_acc1" in row]
        if scored:
            right.plot(*zip(*scored, strict=True), label=run["name"])
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    right.set(xlabel="epoch", ylabel="top-1 (%)", ylim=(0, 100), title="Zero-shot accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def get_args_parser():
    parser = utils.ArgumentParser("report.py", "A table and a picture of runs")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--picture", help="PNG file to write")
    return parser


def main(args):
    runs = [read_run(folder) for folder in args.runs]
    print(markdown_table(runs))
    if args.picture:
        draw(runs, args.picture)
        print(f"\nloss and accuracy per epoch: {args.picture}")


if __name__ == "__main__":
    utils.run(lambda: main(get_args_parser().parse_args()))
