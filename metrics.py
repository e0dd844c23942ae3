"""Scores of a classifier on a labelled set, in percent.

A classifier is judged by each image's best classes and, of two classes, by the margin: that is all
that is kept of its scores. Shapes: n images, C classes, K = min(5, C) best classes.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch

import loops
import utils
from transforms import to_float

RESAMPLES = 1000  # of the bootstrap


@dataclass
class Ranking:
    """top (n, K): the best classes, best first; margin (n,): score of class 1 over class 0; labels
    (n,)."""

    top: torch.Tensor
    margin: torch.Tensor
    labels: torch.Tensor

    def of(self, rows):
        return Ranking(self.top[rows], self.margin[rows], self.labels[rows])


def ranking_width(classes):
    """The columns that rank_classes makes of scores for C classes: K + 1."""
    return min(5, classes) + 1


def rank_classes(scores):
    """(B, C) -> (B, K + 1): what a Ranking needs of each row, as loops.predict collects it."""
    scores = scores.double()  # half precision could not hold the classes' numbers beside them
    margin = scores[:, 1:2] - scores[:, :1] if scores.shape[1] > 1 else scores
    margin = margin + 0 * scores.sum(1, keepdim=True)  # not finite where any score is not
    return torch.cat([scores.topk(min(5, scores.shape[1])).indices, margin], dim=1)


def collected(rows, labels):
    """The Ranking of rank_classes' rows of a whole set."""
    return Ranking(rows[:, :-1].long(), rows[:, -1], labels)


def rank_set(classify, classes, dataset, evaluation):
    """The Ranking of a labelled set of (3, S, S) uint8 images, the same on every rank.

    classify: normalised images (B, 3, S, S) on the device -> scores (B, C).
    """

    def score(images):
        return rank_classes(classify(to_float(images)))

    return collected(*loops.predict(score, ranking_width(classes), dataset, evaluation))


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


def report(folder, name, dataset, ranking, class_names, facts):
    """Prints a classifier's score on a set and adds all that is known of it to folder/name.json."""
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
