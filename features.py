"""Classifiers on frozen features: each image's features once, on disk, then k-NN or regression.

Memory does not grow with images times classes or images times images: both go through the features
in chunks. Shapes: n images, W width of a feature, C classes.
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import utils
from evaluation import check_finite, collect_ranking, rank_classes, sharded_batches
from infra import distributed
from utils import InputError

CHUNK = 16384  # images whose features a classifier sees at once


# ---------------------------------------------------------------------------------------------
# Features on disk


def cache_key(*facts):
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@torch.no_grad()
def extract(tower, width, dataset, path, evaluation):
    """The features of a labelled set, computed once and mapped from disk.

    If the files are absent or damaged they are made: each rank writes its own rows, so all ranks
    must see the folder.

    Args:
        tower: (B, 3, S, S) uint8 images on the device -> (B, W).
        width: W.
        dataset: of (image, label).
        path: of the files, `path`.npy and `path`-labels.npy.
        evaluation: precision, batch size and workers.

    Returns (features (n, W) float32, labels (n,) int64).
    """
    n = len(dataset)
    files = {f"{path}.npy": (np.float32, (n, width)), f"{path}-labels.npy": (np.int64, (n,))}
    if not distributed.broadcast_object(all(is_whole(file, *kind) for file, kind in files.items())):
        if distributed.is_main_process():
            utils.make_folder(os.path.dirname(path))
            reserve({f"{file}.tmp": kind for file, kind in files.items()})
        distributed.barrier()
        features, labels = (np.load(f"{file}.tmp", mmap_mode="r+") for file in files)
        for rows, images, classes in sharded_batches(dataset, evaluation):
            with evaluation.precision.autocast():
                features[rows] = check_finite(tower(images).float().cpu())
            labels[rows] = classes.cpu()
        features.flush()
        labels.flush()
        distributed.barrier()
        if distributed.is_main_process():
            for file in files:
                os.replace(f"{file}.tmp", file)
        distributed.barrier()
    features, labels = (np.load(file, mmap_mode="c") for file in files)  # copied when written to
    return torch.from_numpy(features), torch.from_numpy(labels)


def reserve(files):
    """Makes files of arrays and takes their space on the disk: writing to a map later would end the
    process by a bus error if the disk were full.

    files: {path: (dtype, shape)}. Raises InputError if there is no space.
    """
    try:
        for file, kind in files.items():
            np.lib.format.open_memmap(file, "w+", *kind)
            with open(file, "r+b") as opened:  # the file has a hole of that size
                os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
    except OSError as error:
        for file in files:
            Path(file).unlink(missing_ok=True)
        size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in files.values())
        raise InputError(
            f"folder {os.path.dirname(file)}: {error.strerror}; the features need "
            f"{size / 1e6:,.1f} MB there: free some space, or choose another folder"
        ) from error


def is_whole(file, dtype, shape):
    """Whether a file holds such an array, from its head and length."""
    try:
        kept = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return (kept.dtype, kept.shape) == (dtype, shape)


# ---------------------------------------------------------------------------------------------
# k nearest neighbours (Wu et al., 2018, section 3.4: weighted votes)

COLDEST = 0.002  # exp(1 / temperature) and its inverse are then numbers, and not infinity and 0


def knn_rankings(train, train_labels, test, test_labels, classes, ks, temperature, device):
    """The votes of each test image's k nearest training images, for several k.

    A neighbour of cosine similarity s votes for its class with weight exp(s / temperature). A class
    without a vote is no candidate, so that it is not among the five best either.

    Args:
        train, test: (n, W) and (m, W) features.
        train_labels, test_labels: (n,) and (m,).
        classes: C.
        ks: the numbers of neighbours.
        temperature: of the weights, at least COLDEST.
        device: of the computation.

    Returns {k: evaluation.Ranking of the test images}.
    """
    k_max, rows = min(max(ks), len(train)), {k: [] for k in ks}
    for queries in test.split(1024):
        queries = F.normalize(queries.to(device), dim=-1)
        best = queries.new_full((len(queries), 0), 0.0)
        owners = torch.zeros(len(queries), 0, dtype=torch.long, device=device)
        for keys, labels in zip(train.split(CHUNK), train_labels.split(CHUNK), strict=True):
            similarity = queries @ F.normalize(keys.to(device), dim=-1).T
            best = torch.cat([best, similarity], dim=1)
            owners = torch.cat([owners, labels.to(device).expand(len(queries), -1)], dim=1)
            best, order = best.topk(min(k_max, best.shape[1]))
            owners = owners.gather(1, order)
        for k in ks:
            weights = (best[:, :k] / temperature).double().exp()
            votes = weights.new_zeros(len(queries), classes).scatter_add_(1, owners[:, :k], weights)
            rows[k].append(rank_classes(votes, candidates=votes > 0).cpu())
    return {k: collect_ranking(torch.cat(rows[k]), test_labels) for k in ks}


# ---------------------------------------------------------------------------------------------
# Logistic regression (CLIP, arXiv:2103.00020, appendix A.3)

GRID = [10 ** (-6 + i / 8) for i in range(97)]  # values of C: 8 a decade


def fit_logistic(features, labels, rows, classes, c, device, max_iter=1000):
    """Logistic regression by L-BFGS.

    Minimises mean cross-entropy + |w|^2 / (2 c rows), the bias free: scikit-learn's objective,
    divided by c times the rows.

    Args:
        features: (n, W), mapped from disk.
        labels: (n,).
        rows: (r,) numbers of the images to fit.
        classes: C.
        c: inverse strength of the regularisation.
        device: of the computation.
        max_iter: most iterations.

    Returns weights (C, W + 1); the last column is the bias.
    """
    width = features.shape[1]
    weights = torch.zeros(classes, width + 1, dtype=features.dtype, device=device).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iter, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        penalty = weights[:, :-1].square().sum() / (2 * c * len(rows))
        penalty.backward()
        total = penalty.detach()
        for part in rows.split(CHUNK):
            logits = linear(features[part].to(device), weights)
            loss = F.cross_entropy(logits, labels[part].to(device), reduction="sum") / len(rows)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(closure)
    return weights.detach()


def linear(features, weights):
    return features @ weights[:, :-1].T + weights[:, -1]


@torch.no_grad()
def rank_linear(features, labels, weights):
    """The evaluation.Ranking of images by the classifier of fit_logistic."""
    rows = [
        rank_classes(linear(part.to(weights.device), weights)).cpu()
        for part in features.split(CHUNK)
    ]
    return collect_ranking(torch.cat(rows), labels)


def search_grid(score, size=97, step=16):
    """The index of the highest score(index): every 16th first, then the peak's halfway neighbours.

    Of equal scores the lowest index, so the strongest regularisation, is taken.
    """
    scores = {i: score(i) for i in range(0, size, step)}
    while step > 1:
        step //= 2
        peak = max(scores, key=lambda i: (scores[i], -i))
        for i in (peak - step, peak + step):
            if 0 <= i < size and i not in scores:
                scores[i] = score(i)
    return max(scores, key=lambda i: (scores[i], -i))


def fit_with_search(features, labels, classes, metric, device, seed=0, max_iter=1000):
    """fit_logistic on all images, with the C that is best on a fifth of them, held out.

    Args:
        features: (n, W).
        labels: (n,).
        classes: number of classes.
        metric: evaluation.Ranking -> a score to maximise.
        device: of the computation.
        seed: draws the fifth.
        max_iter: most iterations of a fit.

    Returns (weights, C).
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    fifth = len(order) // 5
    held, rows = order[:fifth].sort().values, order[fifth:].sort().values
    held_features, held_labels = features[held], labels[held]

    def score(i):
        weights = fit_logistic(features, labels, rows, classes, GRID[i], device, max_iter=max_iter)
        return metric(rank_linear(held_features, held_labels, weights))

    c = GRID[search_grid(score)]
    everything = torch.arange(len(features))
    return fit_logistic(features, labels, everything, classes, c, device, max_iter=max_iter), c
