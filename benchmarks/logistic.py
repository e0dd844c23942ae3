"""The command logistic of benchmark.py: our logistic regression beside scikit-learn's."""

import time
from functools import partial
from importlib.metadata import version
from statistics import median

import numpy as np
import torch

import features
from benchmarks.data import CPU, machine, timed

PAUSE = 0.5  # seconds before a fit, in which the other one's threads stop spinning


def draw_features(images, width, classes, spectrum):
    """Features of classes around centres, and their labels.

    spectrum: "tower": variances that fall with 1 / rank, and a mean that is not 0, as a tower gives
    them; "even": equal variances around 0.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    centres = 0.35 * rng.normal(size=(classes, width))
    own = centres[labels] + rng.normal(size=(images, width))
    if spectrum == "tower":
        axes, _ = np.linalg.qr(rng.normal(size=(width, width)))
        own = 4 * own / np.arange(1, width + 1) ** 0.5 @ axes + 2 * rng.normal(size=width)
    return torch.from_numpy(own.astype(np.float32)), torch.from_numpy(labels)


class Precise(features.LogisticRegression):
    """Ends much nearer to the optimum."""

    gtol, ftol = 1e-9, 0.0


def fit_ours(x, labels, classes, c, kind=features.LogisticRegression):
    return kind(x, labels, torch.arange(len(x)), classes, CPU).fit(c, max_iter=1000)


def fit_theirs(x, labels, classes, c):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=1000)
    model.fit(x.numpy(), labels.numpy())
    return torch.from_numpy(np.concatenate([model.coef_, model.intercept_[:, None]], axis=1))


def objective(x, labels, c, weights):
    """Mean cross-entropy and penalty, in float64."""
    logits, weights = features.linear(x.double(), weights.double()), weights.double()
    penalty = weights[:, :-1].square().sum() / (2 * c * len(x))
    return (torch.nn.functional.cross_entropy(logits, labels) + penalty).item()


def benchmark_logistic(args):
    """Seconds of a fit, in turn, and the distance of its objective from the minimum."""
    shape = f"{args.images:,} x {args.width}, {args.classes} classes"
    print(
        f"logistic: {shape}; median of {args.rounds} rounds\n{machine()}, sklearn "
        f"{version('scikit-learn')}\n"
    )
    print("  features        C   minimum  scikit-learn              this code")
    fits = {"theirs": fit_theirs, "ours": fit_ours}
    for spectrum in ("tower", "even"):
        x, labels = draw_features(args.images, args.width, args.classes, spectrum)
        for c in args.c:
            least = fit_ours(x.double(), labels, args.classes, c, Precise)
            score = partial(objective, x, labels, c)
            seconds, weights = {name: [] for name in fits}, {}
            for _ in range(args.rounds):
                for name, fit in fits.items():
                    time.sleep(PAUSE)
                    taken, weights[name] = timed(fit, x, labels, args.classes, c)
                    seconds[name].append(taken)
            columns = "".join(
                f"  {median(seconds[name]):6.2f} s, {score(weights[name]) - score(least):8.1e} off"
                for name in fits
            )
            print(f"  {spectrum:8} {c:8g}  {score(least):8.4f}{columns}", flush=True)
