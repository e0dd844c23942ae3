"""Validation as main.py trains, by its flags: zero-shot accuracy on labelled sets."""

import os
from dataclasses import dataclass, field

import torch

import catalog
import eval_zeroshot
import utils
from evaluation import METRICS, Evaluation, top1
from infra import distributed
from transforms import CenterCrop
from utils import InputError

# ---------------------------------------------------------------------------------------------
# All that a run validates on


@dataclass
class Validation:
    """The labelled sets; the first chooses the best checkpoint."""

    tasks: list = field(default_factory=list)  # of eval_zeroshot.Task

    def __bool__(self):
        """Whether there is anything to measure."""
        return bool(self.tasks)

    def measure(self, model, evaluation):
        """The numbers for the log, {name: number}, the same on every rank.

        The first set's are test_accuracy, test_acc1 and test_acc5, those of a further set
        test_<name>_accuracy and so on.

        Args:
            model: a models.CLIP or SLIP, its buffers equal on all ranks.
            evaluation: precision, batch size, workers and poll.
        """
        stats = {}
        with torch.compiler.set_stance("force_eager"):  # as --evaluate
            for task in self.tasks:
                ranking = eval_zeroshot.rank_images(model, task, evaluation)
                result = eval_zeroshot.summarize_task(task, ranking)
                for key in ("accuracy", "acc1", "acc5"):
                    stats[self.key(task, key)] = result[key]
        return stats

    def key(self, task, name):
        return f"test_{name}" if task is self.tasks[0] else f"test_{task.name}_{name}"

    def lines(self, stats, best):
        """The texts for the screen of a measurement; best: of the first set so far."""
        scores = [f"{task.name} {stats[self.key(task, 'accuracy')]:.2f}" for task in self.tasks]
        return [score + f", best {best:.2f}" * (i == 0) for i, score in enumerate(scores)]


def open_validation(model, args):
    """Opens the sets of --val-dataset. A model without text is scored on none of them."""
    return Validation(open_tasks(model, args) if "text" in model.views else [])


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


# ---------------------------------------------------------------------------------------------
# --evaluate


def evaluate_only(precision, args):
    """Prints the validation of a checkpoint: --resume, or the latest of --output-dir."""
    if args.val_dataset == ["none"]:
        raise InputError("--evaluate has nothing to score: --val-dataset none; choose a set")
    path = args.resume or os.path.join(args.output_dir, "checkpoint.pt")
    model, name = eval_zeroshot.open_model(path)
    if name != args.model:
        raise InputError(f"{path} holds {name}, not {args.model}; check --model")
    validation = open_validation(model.to(precision.device), args)
    stats = validation.measure(model, Evaluation(precision, args.batch_size, args.workers))
    if distributed.is_main_process():
        for task in validation.tasks:
            score = stats[validation.key(task, "accuracy")]
            metric = METRICS.get(task.name, top1).__name__
            images = f"{len(task.dataset)} images of {task.split}"
            print(f"{task.name}: {metric} {score:.2f}, {images}")
