"""Validation as main.py trains, by its flags: zero-shot accuracy, and held-out pairs.

Shapes: n images, m captions, D joint embedding.
"""

import math
import os
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

import captions
import catalog
import eval_zeroshot
import utils
from contrast import InfoNCE
from decoding import decode_image
from eval_retrieval import (
    COLUMNS,
    describe_scores,
    embed_images,
    embed_texts,
    first_texts,
    retrieval_scores,
)
from evaluation import METRICS, Evaluation, top1
from infra import distributed
from infra.archives import read_file
from infra.untrusted import check_inside
from transforms import CenterCrop
from utils import InputError

LOSS_BATCH = 1024  # pairs that the loss contrasts at once, whatever the training's batch is
CAPTIONS = 5  # the first so many of an image, as in eval_retrieval.py


def add_validation_flags(add):
    """Adds main.py's flags of validation."""
    text = "sets scored zero-shot as it trains, the first for checkpoint_best.pt; or none"
    add("--val-dataset", default=["imagenet"], nargs="+", help=text)
    add("--catalog", default=catalog.CATALOG, help="places of the labelled sets (JSON)")
    catalog.add_names_flag(add)
    add("--val-metadata", help="captions of held-out pairs: their loss and retrieval, or none")
    add("--val-root", help="folder of their images; by default --root")
    add("--val-source", help="their kind, as --dataset, which is the default")


# ---------------------------------------------------------------------------------------------
# Held-out pairs


class HeldOutPairs(Dataset):
    """Pairs that the training does not see: (image as `view` makes it of PIL's, row).

    An image that cannot be read is black, and its row is -1.

    Args:
        pairs: sequence of (image path, captions).
        root: folder that the image paths are relative to.
        view: a CenterCrop.
        max_bad_fraction: of the images that may be unreadable.
        allow_outside: bool, whether image paths may lead out of root.
        archived: bool, whether pixels are those of the archived code (decoding.py).
    """

    def __init__(self, pairs, root, view, max_bad_fraction, allow_outside=False, archived=False):
        if not os.path.isdir(root):
            raise InputError(f"{root!r} is not a folder; give the folder of the held-out images")
        self.pairs, self.root, self.view = pairs, root, view
        self.max_bad_fraction, self.archived = max_bad_fraction, archived
        for path, _ in map(pairs.__getitem__, range(len(pairs))):
            check_inside(root, path, "held-out pairs: image", allow_outside)
        self.check_begin()

    def check_begin(self, number=20):
        """Raises InputError if none of the first images can be read, and not after an epoch."""
        rows = range(min(number, len(self)))
        if all(self[row][1] < 0 for row in rows):
            raise InputError(
                f"none of the first {len(rows)} held-out images can be read; check the root; "
                f"the first: {self.fault(0)}"
            )

    def __len__(self):
        return len(self.pairs)

    def read(self, row):
        path, _ = self.pairs[row]
        return self.view(
            decode_image(read_file(self.root, path), f"{self.root}/{path}", self.archived)
        )

    def __getitem__(self, row):
        try:
            return self.read(row), row
        except InputError:
            return torch.zeros(3, self.view.size, self.view.size, dtype=torch.uint8), -1

    def texts(self, rows):
        """(the captions of some rows, and (m,) the place among these rows of each one's)."""
        texts, owners = [], []
        for place, row in enumerate(rows):
            own = first_texts(self.pairs[row][1], CAPTIONS)
            texts += own
            owners += [place] * len(own)
        return texts, torch.tensor(owners)

    def check(self, labels, say):
        """Names the images that could not be read, and returns the rows of the others, (n,).

        Args:
            labels: (all,) as __getitem__ gives them.
            say: see score_pairs.

        Raises InputError, on every rank, if there are too many.
        """
        bad = (labels < 0).nonzero()[:, 0].tolist()
        if len(bad) > self.max_bad_fraction * len(self):
            raise InputError(
                f"{len(bad)} of the {len(self)} held-out images cannot be read, more than the "
                f"allowed fraction of {self.max_bad_fraction:g}; the first: {self.fault(bad[0])}"
            )
        for row in bad if distributed.is_main_process() else ():
            say(f"held-out pairs, left out: {self.fault(row)}")
        return (labels >= 0).nonzero()[:, 0]

    def fault(self, row):
        """Why an image cannot be read; another attempt tells."""
        try:
            self.read(row)
        except InputError as error:
            return utils.one_line(error)
        return f"{self.root}/{self.pairs[row][0]} could not be read at first"


def contrastive_loss(images, texts, scale):
    """CLIP's loss of matching unit rows (n, D), in batches of like size of at most LOSS_BATCH.

    The batches are neighbours in the order of the file; the loss is the mean over all rows.
    """
    contrast, total, parts = InfoNCE(), 0.0, math.ceil(len(images) / LOSS_BATCH)
    for image, text in zip(images.tensor_split(parts), texts.tensor_split(parts), strict=True):
        labels = torch.arange(len(image), device=image.device)
        by_image, *_ = contrast(image, text, labels, scale)
        by_text, *_ = contrast(text, image, labels, scale)
        total += len(image) * (by_image + by_text).item() / 2
    return total / len(images)


@torch.no_grad()
def score_pairs(model, pairs, evaluation, say):
    """Loss and retrieval of held-out pairs, {name: number}, the same on every rank.

    The loss contrasts each image with its first caption, retrieval takes the first CAPTIONS.
    Memory grows with the number of pairs, not with its square.

    Args:
        model: a models.CLIP or SLIP.
        pairs: HeldOutPairs.
        evaluation: precision, batch size, workers and poll.
        say: function of a text, called on rank 0 for each image that cannot be read.
    """
    model.eval()
    embeds, labels = embed_images(model, pairs, evaluation)
    rows = pairs.check(labels, say)
    images = embeds[rows.to(embeds.device)]  # (n, D)
    texts, owners = pairs.texts(rows.tolist())
    texts, owners = embed_texts(model, texts, evaluation), owners.to(images.device)  # (m, D)
    first = torch.searchsorted(owners, torch.arange(len(images), device=images.device))
    loss = contrastive_loss(images, texts[first], model.logit_scale.exp().double())
    counts = {"images": len(images), "captions": len(texts), "bad_images": len(pairs) - len(rows)}
    return {"loss": loss} | retrieval_scores(images, texts, owners) | counts


# ---------------------------------------------------------------------------------------------
# The validation of a run


@dataclass
class Validation:
    """Labelled sets, of which the first chooses the best checkpoint, and held-out pairs."""

    tasks: list = field(default_factory=list)  # of eval_zeroshot.Task
    pairs: HeldOutPairs | None = None

    def __bool__(self):
        """Whether there is anything to measure."""
        return bool(self.tasks or self.pairs)

    def measure(self, model, evaluation, say=print):
        """The numbers for the log, {name: number}, the same on every rank.

        The first set's are test_accuracy, test_acc1 and test_acc5, those of a further set
        test_<name>_accuracy and so on; those of held-out pairs begin with val_.

        Args:
            model: a models.CLIP or SLIP, its buffers equal on all ranks.
            evaluation: precision, batch size, workers and poll.
            say: function of a text, called on rank 0 for each image that cannot be read.
        """
        stats = {}
        with torch.compiler.set_stance("force_eager"):  # as --evaluate
            for task in self.tasks:
                ranking = eval_zeroshot.rank_images(model, task, evaluation)
                result = eval_zeroshot.summarize_task(task, ranking)
                for key in ("accuracy", "acc1", "acc5"):
                    stats[self.key(task, key)] = result[key]
            if self.pairs:
                scores = score_pairs(model, self.pairs, evaluation, say)
                stats |= {f"val_{key}": value for key, value in scores.items()}
        return stats

    def measure_both(self, model, average, evaluation, say=print):
        """The same, and those of a model with averaged weights, if any, which begin with ema_."""
        stats = self.measure(model, evaluation, say)
        if average is not None:
            distributed.broadcast_buffers(average)
            found = self.measure(average, evaluation, say)
            stats |= {f"ema_{key}": value for key, value in found.items()}
        return stats

    def key(self, task, name):
        return f"test_{name}" if task is self.tasks[0] else f"test_{task.name}_{name}"

    def lines(self, stats, best):
        """The texts for the screen of a measurement; best: of the first set so far."""
        scores = [f"{task.name} {stats[self.key(task, 'accuracy')]:.2f}" for task in self.tasks]
        scores[:1] = [f"{score}, best {best:.2f}" for score in scores[:1]]
        scores += self.lines_of_average(stats)
        return scores + (self.lines_of_pairs(stats) if self.pairs else [])

    def lines_of_average(self, stats):
        keys = {task.name: f"ema_{self.key(task, 'accuracy')}" for task in self.tasks}
        found = [f"{name} {stats[key]:.2f}" for name, key in keys.items() if key in stats]
        if "ema_val_loss" in stats:
            found.append(f"held-out pairs: loss {stats['ema_val_loss']:.4f}")
        return [f"averaged weights: {', '.join(found)}"] if found else []

    def lines_of_pairs(self, stats):
        scores = {key.removeprefix("val_"): x for key, x in stats.items() if key.startswith("val_")}
        size = f"{scores['images']} images, {scores['captions']} captions"
        head = f"held-out pairs: loss {scores['loss']:.4f}, {size}; {COLUMNS}"
        return [head, *(f"held-out pairs: {line}" for line in describe_scores(scores))]


def open_validation(model, args):
    """Opens the sets of --val-dataset and --val-metadata.

    A model without text is scored on none of the labelled sets.
    """
    if "text" in model.views:
        return Validation(open_tasks(model, args), open_pairs(model, args))
    if args.val_metadata:
        raise InputError(f"--val-metadata: {args.model} has no text to score; omit the flag")
    return Validation()


def open_pairs(model, args):
    """The HeldOutPairs of --val-metadata, None without that flag."""
    if not args.val_metadata:
        return None
    is_same = os.path.realpath(args.val_metadata) == os.path.realpath(args.metadata)
    if is_same and distributed.is_main_process():
        print("note: --val-metadata is --metadata: its pairs are trained on, not held out")
    source = args.val_source or args.dataset
    columns = (args.csv_img_key, args.csv_caption_key, *args.json_caption_key)
    try:
        pairs = distributed.rank_zero_first(
            lambda: captions.load_captions(source, args.val_metadata, columns)
        )
        root = args.val_root or args.root or pairs.root
        options = args.max_bad_fraction, args.allow_outside_root, args.archived_pixels
        return HeldOutPairs(pairs, root, CenterCrop.of(model.preprocessing), *options)
    except InputError as error:
        raise InputError(f"--val-metadata: {error}") from error


def open_tasks(model, args):
    names = args.val_dataset
    if names == ["none"]:
        return []
    if len(set(names)) < len(names):
        raise InputError(f"--val-dataset names a set twice: {' '.join(names)}; name each once")
    sets = catalog.load_catalog(args.catalog, args.allow_outside_root, args.ignore_folder_names)
    labels = utils.read_json(catalog.LABELS, "labels")
    templates = utils.read_json(catalog.TEMPLATES, "templates")
    view = CenterCrop.of(model.preprocessing)
    try:
        return [eval_zeroshot.open_task(name, view, sets, labels, templates) for name in names]
    except InputError as error:
        raise InputError(f"--val-dataset: {error} (or give --val-dataset none)") from error


def validate(model, average, validation, evaluation, run, stats):
    """Adds the numbers of a validation to the epoch's; returns whether the weights are the best."""
    try:
        stats |= validation.measure_both(model, average, evaluation, run.log.info_once)
    except InputError:
        run.end_epoch(stats)  # what was trained is kept
        raise
    score = stats.get("test_accuracy", 0.0)
    is_best = score > run.state.best_acc1
    run.state.best_acc1 = max(score, run.state.best_acc1)
    for line in validation.lines(stats, run.state.best_acc1):
        run.log.info(f"epoch {run.state.epoch}: {line}")
    return is_best


# ---------------------------------------------------------------------------------------------
# --evaluate


def evaluate_only(precision, folder, args):
    """Prints the validation of a checkpoint: --resume, or the latest in the run's folder."""
    if args.val_dataset == ["none"] and not args.val_metadata:
        raise InputError("--evaluate has nothing to score: --val-dataset none; choose a set")
    path = args.resume or os.path.join(folder, "checkpoint.pt")
    model, name = eval_zeroshot.open_model(path)
    if name != args.model:
        raise InputError(f"{path} holds {name}, not {args.model}; check --model")
    validation = open_validation(model.to(precision.device), args)
    evaluation = Evaluation(precision, args.batch_size, args.workers)
    stats = validation.measure(model, evaluation)
    if distributed.is_main_process():
        for task in validation.tasks:
            score = stats[validation.key(task, "accuracy")]
            metric = METRICS.get(task.name, top1).__name__
            images = f"{len(task.dataset)} images of {task.split}"
            print(f"{task.name}: {metric} {score:.2f}, {images}")
        for line in validation.lines_of_pairs(stats) if validation.pairs else ():
            print(line)
