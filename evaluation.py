"""Evaluation over a labelled set: prediction on all ranks, and the metrics, in percent.

A classifier is judged by each image's best classes and, for two classes, by the margin: its other
scores are not kept. Shapes: n images, B of a batch, C classes, K = min(5, C) best classes.
"""

import math
import os
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

import utils
from infra.devices import Precision, to_device
from infra.distributed import all_reduce, get_rank, get_world_size
from infra.signals import shield_worker
from utils import InputError

# ---------------------------------------------------------------------------------------------
# Prediction


@dataclass(frozen=True)
class Evaluation:
    """The way a model runs over a labelled set."""

    precision: Precision
    batch_size: int = 256  # images per rank and step
    workers: int = 10
    # Called by all ranks, with a function that waits for a batch; may raise to stop there.
    poll: callable = lambda wait=lambda: None: wait()


def split_rows(n):
    """The row numbers of each rank: neighbours, in rank order, every row once."""
    return torch.arange(n).tensor_split(get_world_size())


def sharded_batches(dataset, evaluation):
    """This rank's batches of a labelled set: (row numbers, images and labels on the device)."""
    e, device = evaluation, evaluation.precision.device
    mine = split_rows(len(dataset))[get_rank()]
    loader = DataLoader(
        Subset(dataset, mine.tolist()),
        e.batch_size,
        num_workers=min(e.workers, len(mine)),
        pin_memory=device.type == "cuda",
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # of its workers' seeds: takes none of the run's numbers
    )
    batches = iter(loader)
    for start in range(0, math.ceil(len(dataset) / get_world_size()), e.batch_size):
        batch = e.poll(lambda: next(batches, None))  # a rank may have a batch less than others
        if start < len(mine):
            yield mine[start : start + e.batch_size], *to_device(batch, device)


def check_finite(outputs):
    """Returns a model's outputs; numbers that are not finite would lose comparisons unnoticed."""
    if outputs.isfinite().all():
        return outputs
    raise InputError(
        "the model's outputs are not finite: its checkpoint's weights are most likely not; take "
        "another checkpoint, or try precision fp32"
    )


@torch.no_grad()
def predict(score_fn, width, dataset, evaluation):
    """Scores every image of a labelled set once, on all ranks together.

    Args:
        score_fn: images of a batch on the device -> (B, width).
        width: the number of scores of an image.
        dataset: of (image, label).
        evaluation: precision, batch size and workers.

    Returns (scores (n, width) float64, labels (n,) int64) on the CPU, in the set's order; every
    rank returns the same, as one process would.
    """
    precision = evaluation.precision
    # Ranks fill in their own rows of zeros, so that the sum over ranks is the whole.
    scores = torch.zeros(len(dataset), width + 1, dtype=torch.float64, device=precision.device)
    for rows, images, labels in sharded_batches(dataset, evaluation):
        rows = rows.to(precision.device)
        with precision.autocast():
            scores[rows, :-1] = score_fn(images).double()
        scores[rows, -1] = labels.double()
    scores = check_finite(all_reduce(scores).cpu())
    return scores[:, :-1], scores[:, -1].long()


# ---------------------------------------------------------------------------------------------
# Metrics

RESAMPLES = 1000  # of the bootstrap
RESERVE = 2**20  # bytes for results that the disk must have before the scoring


@dataclass
class Ranking:
    """The classes that a classifier ranked best for each image of a set."""

    top: torch.Tensor  # (n, K), best first; -1: no further class is a candidate
    margin: torch.Tensor  # (n,) score of class 1 over class 0
    labels: torch.Tensor  # (n,)

    def of(self, rows):
        return Ranking(self.top[rows], self.margin[rows], self.labels[rows])


def ranking_width(classes):
    """The columns that rank_classes makes of scores for C classes: K + 1."""
    return min(5, classes) + 1


def rank_classes(scores, candidates=None):
    """Best classes and margin of each image, as `predict` collects them.

    Args:
        scores: (B, C).
        candidates: (B, C) bool, the classes that may be ranked; None: all.

    Returns (B, K + 1); -1 takes the place of a class if an image has fewer than K candidates.
    """
    scores = scores.double()  # half precision could not hold the classes' numbers beside them
    margin = scores[:, 1:2] - scores[:, :1] if scores.shape[1] > 1 else scores
    margin = margin + 0 * scores.sum(1, keepdim=True)  # not finite if any score is not
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -torch.inf)
    best, classes = scores.topk(min(5, scores.shape[1]))
    if candidates is not None:
        classes = classes.masked_fill(best == -torch.inf, -1)
    return torch.cat([classes, margin], dim=1)


def collect_ranking(rows, labels):
    """The Ranking of rank_classes' rows of a whole set."""
    return Ranking(rows[:, :-1].long(), rows[:, -1], labels)


def rank_set(classify, classes, dataset, evaluation):
    """The Ranking of a labelled set of (3, S, S) uint8 images, the same on every rank.

    Args:
        classify: (B, 3, S, S) uint8 images on the device -> scores (B, C).
        classes: C.
        dataset: of (image, label).
        evaluation: precision, batch size and workers.
    """

    def score(images):
        return rank_classes(classify(images))

    return collect_ranking(*predict(score, ranking_width(classes), dataset, evaluation))


def top1(r):
    return 100 * (r.top[:, 0] == r.labels).double().mean().item()


def top5(r):
    return 100 * (r.top == r.labels[:, None]).any(1).double().mean().item()


def mean_per_class(r):
    """The mean, over the classes that occur, of the accuracy on their images."""
    hits = (r.top[:, 0] == r.labels).double()
    counts = r.labels.bincount()
    return 100 * (r.labels.bincount(hits)[counts > 0] / counts[counts > 0]).mean().item()


def mean_top1_top5(r):
    return (top1(r) + top5(r)) / 2


def roc_auc(r):
    """Of two classes: how often an image of class 1 has the larger margin."""
    from sklearn.metrics import roc_auc_score

    return 100 * roc_auc_score(r.labels, r.margin)


METRICS = {  # every other set: top1
    "aircraft": mean_per_class,
    "pets": mean_per_class,
    "caltech101": mean_per_class,
    "flowers": mean_per_class,
    "kinetics700_frames": mean_top1_top5,
    "hateful_memes": roc_auc,
}


def summarize(name, ranking):
    """The protocol's metric of set `name` as "accuracy", and the common ones."""
    metric = METRICS.get(name, top1)
    return {
        "accuracy": metric(ranking),
        "metric": metric.__name__,
        "acc1": top1(ranking),
        "acc5": top5(ranking),
        "mean_per_class": mean_per_class(ranking),
        "images": len(ranking.labels),
    }


def bootstrap_interval(metric, ranking, resamples=RESAMPLES):
    """[low, high]: the middle 95% of a metric over sets drawn from this one with replacement.

    Draws in which the metric is undefined (the area under a curve of one class) are drawn again.
    """
    rng, n, values = np.random.default_rng(0), len(ranking.labels), []
    is_varied = len(ranking.labels.unique()) > 1
    while len(values) < resamples:
        sample = ranking.of(torch.from_numpy(rng.integers(n, size=n)))
        if metric is not roc_auc or not is_varied or len(sample.labels.unique()) > 1:
            values.append(metric(sample))
    return np.percentile(values, [2.5, 97.5]).tolist()


def confusions(ranking, number=10):
    """The most frequent (true class, predicted class, images, row of the first), most first."""
    rows = (ranking.labels != ranking.top[:, 0]).nonzero()[:, 0].tolist()
    pairs = {}
    for row in rows:
        pair = ranking.labels[row].item(), ranking.top[row, 0].item()
        pairs.setdefault(pair, []).append(row)
    ordered = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))[:number]
    return [(*pair, len(found), found[0]) for pair, found in ordered]


def details(name, ranking, class_names):
    """The interval of the set's metric, each class's accuracy, and the most confused pairs.

    class_names: C texts. A pair is [true class, predicted class, number of images].
    """
    counts = ranking.labels.bincount(minlength=len(class_names))
    hits = ranking.labels[ranking.labels == ranking.top[:, 0]].bincount(minlength=len(class_names))
    return {
        "interval": bootstrap_interval(METRICS.get(name, top1), ranking),
        "per_class": {
            class_names[c]: 100 * int(hits[c]) / int(counts[c])
            for c in range(len(class_names))
            if counts[c]
        },
        "confused": [
            [class_names[true], class_names[predicted], number]
            for true, predicted, number, _ in confusions(ranking)
        ],
    }


def check_results(folder, *names):
    """Raises InputError if rank 0 could not add results to folder/name.json after the scoring.

    Reads the old results, and writes a file without a name; nothing is left behind.
    """
    if get_rank():
        return
    for path in (os.path.join(folder, f"{name}.json") for name in names):
        if os.path.exists(path):
            try:
                utils.read_json_object(path, "results")
            except InputError as error:
                raise InputError(
                    f"{error}; correct or remove it, or choose another folder"
                ) from None
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(RESERVE))
    except OSError as error:
        raise InputError(f"folder {folder}: {error.strerror}; choose another") from error


def report_score(folder, name, dataset, ranking, class_names, facts):
    """Prints a classifier's score on a set, and adds it with all details to folder/name.json.

    Args:
        folder: of the results.
        name: of the classifier.
        dataset: name of the set, which chooses the metric.
        ranking: of the set's images.
        class_names: C texts.
        facts: further entries of the result, {name: value}.
    """
    result = summarize(dataset, ranking) | facts | details(dataset, ranking, class_names)
    utils.update_json(os.path.join(utils.make_folder(folder), f"{name}.json"), {dataset: result})
    low, high = result["interval"]
    extra = "".join(f", {key} {value}" for key, value in facts.items())
    print(
        f"{dataset} {name}: {result['metric']} {result['accuracy']:.2f} [{low:.2f}, {high:.2f}], "
        f"{result['images']} images{extra}",
        flush=True,
    )


def display_names(classes):
    """One name a class, of a list whose items are names or lists of synonyms; no name twice."""
    names = [c if isinstance(c, str) else c[0] for c in classes]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
