"""Classifiers on frozen features: each image's features once, on disk, then k-NN or regression.

Memory does not grow with images times classes or images times images: both go through the features
in chunks. Shapes: n images, W width of a feature, C classes.
"""

import hashlib
import math
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

import utils
from evaluation import check_finite, collect_ranking, rank_classes, sharded_batches, split_rows
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

    If the files are absent or damaged they are made. All ranks must see their folder.

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
    is_main = distributed.is_main_process()
    if not distributed.broadcast_object(is_main and all(is_whole(f, *files[f]) for f in files)):
        utils.make_folder(os.path.dirname(path))
        with ExitStack() as stack:
            names = [stack.enter_context(utils.temporary_name(file)) for file in files]
            write_share(tower, dataset, dict(zip(names, files.values(), strict=True)), evaluation)
            all_names = distributed.all_gather_object([names])
            if is_main:
                join_shares(all_names)
                for name, file in zip(names, files, strict=True):
                    os.replace(name, file)
            distributed.barrier()
    features, labels = (np.load(file, mmap_mode="c") for file in files)  # copied when written to
    return torch.from_numpy(features), torch.from_numpy(labels)


def write_share(tower, dataset, files, evaluation):
    """Writes this rank's rows to files of its own; rank 0's have room for all ranks' rows.

    Machines that wrote to one map would undo each other's writes on network storage, where whole
    pages are written back.

    Args:
        tower, dataset, evaluation: see extract.
        files: {path: (dtype, shape with all rows)}, of features and of labels.
    """
    mine = split_rows(len(dataset))[distributed.get_rank()]
    if not distributed.is_main_process():
        files = {f: (dtype, (len(mine), *shape[1:])) for f, (dtype, shape) in files.items()}
    reserve(files)
    features, labels = (np.load(file, mmap_mode="r+") for file in files)
    for rows, images, classes in sharded_batches(dataset, evaluation):
        with evaluation.precision.autocast():
            features[rows - mine[0]] = check_finite(tower(images).float().cpu())
        labels[rows - mine[0]] = classes.cpu()
    features.flush()
    labels.flush()


def join_shares(names):
    """Copies the rows of all ranks into rank 0's files; names: each rank's list of files."""
    for whole, *parts in zip(*names, strict=True):
        array = np.load(whole, mmap_mode="r+")
        rows = split_rows(len(array))
        for rank, part in enumerate(parts, start=1):
            try:
                array[rows[rank].numpy()] = np.load(part, mmap_mode="r")
            except FileNotFoundError as error:
                raise InputError(
                    f"features of rank {rank}, {part}: rank 0 does not see them; choose an output "
                    "folder that all machines share"
                ) from error
        array.flush()


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
KEPT = 2**30  # bytes of features that a fit may keep on the CPU; on CUDA half of the free memory


class Rows:
    """Some rows of features and labels as chunks on the device, kept there if they fit."""

    def __init__(self, features, labels, rows, device):
        self.features, self.labels, self.parts = features, labels, rows.split(CHUNK)
        self.device, self.number = device, len(rows)
        room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT
        size = len(rows) * features.shape[1] * features.element_size()
        self.kept = list(self.load()) if size <= room else None

    def load(self):
        for part in self.parts:
            yield self.features[part].to(self.device), self.labels[part].to(self.device)

    def __iter__(self):
        return iter(self.kept) if self.kept is not None else self.load()


class LogisticRegression:
    """Fits by L-BFGS on the same rows, for any C.

    Minimises mean cross-entropy + |w|^2 / (2 c rows), the bias free: scikit-learn's objective,
    divided by c times the rows. L-BFGS sees other variables, in which the curvature at even
    probabilities is the same in all directions: features are centred, and scaled along the
    principal axes of their covariance. That takes a tenth of the steps if the features' variances
    differ much, as a tower's do, and the norm of the gradient tells the distance to the minimum.
    Products are in the features' precision, sums over chunks in float64.
    """

    gtol = 1e-5  # largest entry of the gradient at which a fit ends
    ftol = 1e-8  # or change of the objective in a step, relative to it or to 1: float32's limit

    def __init__(self, features, labels, rows, classes, device):
        """Reads the features once.

        Args:
            features: (n, W), mapped from disk.
            labels: (n,).
            rows: (r,) numbers of the images to fit.
            classes: C.
            device: of the computation.
        """
        self.rows, self.classes = Rows(features, labels, rows, device), classes
        self.dtype, self.device, self.width = features.dtype, device, features.shape[1]
        self.mean, self.variances, self.axes = self.principal_axes()

    def principal_axes(self):
        """Mean (W,), variances (W,) and principal axes (W, W) of the features, in float64."""
        origin = next(iter(self.rows))[0].mean(0)  # near the mean, so that little cancels
        first = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        second = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        for part, _ in self.rows:
            part = part - origin
            first += part.sum(0)
            second += part.T @ part
        first, second = first / self.rows.number, second / self.rows.number
        variances, axes = torch.linalg.eigh(second - first[:, None] * first)
        return origin + first, variances.clamp(min=1e-7 * variances[-1].item()), axes

    def loss(self, weights):
        """The mean cross-entropy, and its gradient by the weights.

        weights: (C, W + 1) in float64; the last column is the bias. Returns (float, (C, W + 1)).
        """
        own, gradient, total = weights.to(self.dtype), torch.zeros_like(weights), 0.0
        for part, labels in self.rows:
            logs, mine = linear(part, own).log_softmax(1), labels[:, None]
            total = total - logs.gather(1, mine).sum(dtype=torch.float64)
            errors = logs.exp_()  # probabilities minus one-hot labels
            errors.scatter_add_(1, mine, errors.new_full(mine.shape, -1))
            gradient[:, :-1] += errors.T @ part
            gradient[:, -1] += errors.sum(0)
        return total.item() / self.rows.number, gradient / self.rows.number

    def fit(self, c, max_iter=1000):
        """Minimises for one C.

        Args:
            c: inverse strength of the regularisation.
            max_iter: most iterations.

        Returns weights (C, W + 1); the last column is the bias.
        """
        decay, shape = 1 / (c * self.rows.number), (self.classes, self.width + 1)
        scales = (self.variances / self.classes + decay).rsqrt()

        def weights_of(variables):
            u = torch.from_numpy(variables).view(shape).to(self.device)
            w = (u[:, :-1] * scales) @ self.axes.T
            return torch.cat([w, (u[:, -1] * self.classes**0.5 - w @ self.mean)[:, None]], dim=1)

        def objective(variables):
            weights = weights_of(variables)
            w, (loss, gradient) = weights[:, :-1], self.loss(weights)
            slope = gradient[:, :-1] + decay * w - gradient[:, -1:] * self.mean
            by = [(slope @ self.axes) * scales, gradient[:, -1:] * self.classes**0.5]
            penalty = 0.5 * decay * w.square().sum().item()
            return loss + penalty, torch.cat(by, dim=1).cpu().numpy().ravel()

        options = {
            "maxiter": max_iter,
            "maxfun": 100 * max_iter,
            "gtol": self.gtol,
            "ftol": self.ftol,
        }
        options["maxls"] = 10  # steps of a line search; at float32's limit they are in vain
        # SciPy's threads, for its few sums over variables, and PyTorch's would hold each other up.
        with threadpool_limits(1, user_api="blas"):
            found = minimize(
                objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options
            )
        return weights_of(found.x).to(self.dtype)


def linear(features, weights):
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


@torch.no_grad()
def rank_linear(features, labels, weights):
    """The evaluation.Ranking of images by a LogisticRegression's weights."""
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


def search_c(features, labels, classes, metric, device, seed, max_iter):
    """The C, of GRID, that is best on a fifth of the images, held out; see fit_with_search."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    fifth = len(order) // 5
    held, rows = order[:fifth].sort().values, order[fifth:].sort().values
    held_features, held_labels = features[held], labels[held]
    regression = LogisticRegression(features, labels, rows, classes, device)

    def score(i):
        return metric(rank_linear(held_features, held_labels, regression.fit(GRID[i], max_iter)))

    return GRID[search_grid(score)]


def fit_with_search(features, labels, classes, metric, device, seed=0, max_iter=1000):
    """Logistic regression on all images, with the C of search_c.

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
    c = search_c(features, labels, classes, metric, device, seed, max_iter)
    everything = torch.arange(len(features))
    regression = LogisticRegression(features, labels, everything, classes, device)
    return regression.fit(c, max_iter), c
