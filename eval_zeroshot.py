"""Zero-shot classification: prompts -> text classifier -> metric, for the sets of the catalog.

    python eval_zeroshot.py --resume checkpoint_best.pt --datasets imagenet cifar10
    torchrun --nproc-per-node 8 eval_zeroshot.py --resume checkpoint_best.pt

Protocol of the paper (arXiv:2112.12750, section 4.1; the metrics are CLIP's).
Shapes: C classes, D joint embedding, n images of a set.
"""

import base64
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import utils
from catalog import (
    CATALOG,
    LABELS,
    TEMPLATES,
    add_names_flag,
    add_outside_flag,
    classes_of,
    get_downstream_dataset,
    is_present,
    load_catalog,
    split_name,
)
from evaluation import (
    Evaluation,
    check_results,
    confusions,
    details,
    display_names,
    rank_set,
    summarize,
)
from infra import devices, distributed
from pretrained import load_model
from transforms import CenterCrop, encode_jpeg
from utils import InputError, positive_int

PROMPTS = {"cpu": 64}  # in a batch; 256 elsewhere

# ---------------------------------------------------------------------------------------------
# One set


@dataclass
class Task:
    """A labelled set, its class names (each a str or a list of synonyms) and its prompts."""

    name: str
    dataset: Dataset
    split: str
    source: str  # the set whose classes and prompts these are: most often this one
    classes: list
    templates: list


def open_task(name, view, catalog, labels, templates):
    """A Task of images as `view` makes them of PIL's.

    A set with some of another's classes is scored among these alone, as the field does.

    Raises InputError if the set, its labels or its prompts are absent or do not fit.
    """
    if name not in catalog:
        raise InputError(f"unknown dataset {name!r}; choose from {', '.join(catalog)}")
    source = catalog[name]["labels"]
    for kind, table in (("labels", labels), ("templates", templates)):
        if source not in table:
            raise InputError(f"{kind}: unknown dataset {source!r}; choose from {', '.join(table)}")
        if not isinstance(table[source], list):
            raise InputError(f"labels and templates of {source!r} must be lists of texts")
    if not templates[source]:
        raise InputError(
            f"templates of {source!r}: there is none; give one with {{}} for the class"
        )
    if not all(isinstance(template, str) and "{}" in template for template in templates[source]):
        raise InputError(f"templates of {source!r}: each must be a text with {{}} for the class")
    classes = classes_of(catalog, name, is_train=False, labels=labels)
    dataset = get_downstream_dataset(catalog, name, is_train=False, transform=view, labels=classes)
    split = split_name(catalog, name, is_train=False)
    return Task(name, dataset, split, source, classes, templates[source])


@torch.no_grad()
def build_classifier(model, classes, templates, evaluation, batch_size=None):
    """(C, D) unit rows: per class the mean of its prompts' unit embeddings, normalised again.

    Prompts of like length share a batch, the longest first, so that hardly any padding is encoded.

    Args:
        model: a models.CLIP or SLIP in evaluation mode.
        classes: C names, or lists of synonyms.
        templates: prompts with {} for the name.
        evaluation: precision.
        batch_size: prompts in a batch; None: by the device.
    """
    prompts, owners = [], []
    for owner, names in enumerate(classes):
        for name in [names] if isinstance(names, str) else names:
            prompts += [template.replace("{}", name) for template in templates]
            owners += [owner] * len(templates)
    device, tokenizer = evaluation.precision.device, model.tokenizer
    tokens = tokenizer(prompts)
    order = tokenizer.lengths(tokens).argsort(descending=True, stable=True)
    embeds = torch.empty(len(prompts), model.embed_dim, device=device)
    for rows in order.split(batch_size or PROMPTS.get(device.type, 256)):
        evaluation.poll()
        text = tokenizer.trim(tokens[rows], buckets=None).to(device)
        with evaluation.precision.autocast():
            embeds[rows.to(device)] = F.normalize(model.encode_text(text).float(), dim=-1)
    sums = embeds.new_zeros(len(classes), embeds.shape[1])
    sums.index_add_(0, torch.tensor(owners, device=sums.device), embeds)
    return F.normalize(sums, dim=-1)


def rank_images(model, task, evaluation):
    """The evaluation.Ranking of a task's images by cosine similarity to its classes."""
    model.eval()
    classifier = build_classifier(model, task.classes, task.templates, evaluation)

    def classify(images):
        embed = F.normalize(model.encode_image(model.normalize(images)).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            return embed @ classifier.T

    return rank_set(classify, len(task.classes), task.dataset, evaluation)


def summarize_task(task, ranking):
    """Scores on a task, in percent: its protocol's metric as `accuracy`, acc1, acc5, and more."""
    return {
        **summarize(task.name, ranking),
        "split": task.split,
        "classes": len(task.classes),
        "prompts": len(task.templates),
    }


def picture_confusions(task, ranking):
    """One image of each of the most confused pairs, for report.py: [.., base64 of a JPEG]."""
    names, examples = display_names(task.classes), []
    for true, predicted, number, row in confusions(ranking):
        pixels, _ = task.dataset[row]
        jpeg = base64.b64encode(encode_jpeg(pixels)).decode()
        examples.append([names[true], names[predicted], number, jpeg])
    return examples


# ---------------------------------------------------------------------------------------------
# Command line


def get_args_parser():
    parser = utils.ArgumentParser("eval_zeroshot.py", "Zero-shot accuracy of a checkpoint")
    parser.add_argument(
        "--resume", required=True, nargs="+", help="weights: files, NAME:TAG, see docs/weights.md"
    )
    parser.add_argument("--output-dir", default="./", help="folder of results.json")
    parser.add_argument("--datasets", nargs="+", help="sets to score; those present if not given")
    parser.add_argument("--catalog", default=CATALOG, help="places of the sets (JSON)")
    add_outside_flag(parser.add_argument)
    add_names_flag(parser.add_argument)
    parser.add_argument("--labels", default=LABELS, help="class names (JSON)")
    parser.add_argument("--templates", default=TEMPLATES, help="prompts (JSON)")
    parser.add_argument("--prompts", help="prompts of that name for every set: imagenet80, CLIP's")
    parser.add_argument(
        "--batch-size", default=256, type=positive_int, help="images per rank and step"
    )
    parser.add_argument("--image-size", type=positive_int, help="pixels; by default the model's")
    devices.add_system_flags(parser)
    return parser


def choose_sets(names, catalog):
    """The named sets, or all that are present; the absent ones are reported, not passed over."""
    if names:
        return names
    present = [name for name, entry in catalog.items() if is_present(entry)]
    if not present:
        raise InputError("no set of the catalog is present; change its paths or give --catalog")
    if distributed.is_main_process() and len(present) < len(catalog):
        print("absent, not scored:", ", ".join(n for n in catalog if n not in present))
    return present


def folder_of(checkpoint, args):
    """Where its results.json goes: with several checkpoints, a folder for each, named after it."""
    if len(args.resume) == 1:
        return args.output_dir
    parent, name = os.path.split(os.path.splitext(os.path.abspath(checkpoint))[0])
    return os.path.join(args.output_dir, f"{os.path.basename(parent)}-{name}")


def open_model(path, image_size=None):
    """(a model that can be prompted, its name) from a string of weights."""
    model, train_args = load_model(path, image_size)
    if "text" not in model.views:
        raise InputError(
            f"{path} holds {train_args.model}: it has no text to prompt; choose a checkpoint of "
            "CLIP or SLIP, or main_linear.py"
        )
    return model, train_args.model


def evaluate_checkpoint(path, tasks_of, device, args):
    """Scores a checkpoint on all tasks; rank 0 prints them and adds them to results.json."""
    model, name = open_model(path, args.image_size)
    model.to(device)
    precision, tasks = devices.Precision(args.precision, device), tasks_of(model)
    evaluation = Evaluation(precision, args.batch_size, args.workers)
    folder = folder_of(path, args)
    if distributed.is_main_process():
        utils.make_folder(folder)
        if len(args.resume) > 1:
            print(f"{path}:")
    for task in tasks:
        ranking = rank_images(model, task, evaluation)
        if not distributed.is_main_process():
            continue
        result = {"checkpoint": path, "model": name, "prompt_set": args.prompts or task.source}
        result |= summarize_task(task, ranking)
        result |= details(task.name, ranking, display_names(task.classes))
        low, high = result["interval"]
        print(
            f"{task.name:20s} {result['accuracy']:6.2f} [{low:.2f}, {high:.2f}]  "
            f"{result['metric']:14s} {result['images']:6d} images of {task.split}",
            flush=True,
        )
        utils.update_json(os.path.join(folder, "results.json"), {task.name: result})
        examples = {task.name: picture_confusions(task, ranking)}
        utils.update_json(os.path.join(folder, "examples.json"), examples)


def main(args):
    device = distributed.init_distributed(args.device, args.dist_url, args.deterministic)

    catalog = load_catalog(args.catalog, args.allow_outside_root, args.ignore_folder_names)
    labels = utils.read_json_object(args.labels, "labels")
    templates = utils.read_json_object(args.templates, "templates")
    names = choose_sets(args.datasets, catalog)
    if args.prompts and args.prompts not in templates:
        raise InputError(f"--prompts {args.prompts!r} is none of {', '.join(templates)}")
    if args.prompts:
        templates = dict.fromkeys([*templates, *names], templates[args.prompts])
    if len({folder_of(path, args) for path in args.resume}) < len(args.resume):
        raise InputError("--resume: checkpoints of equal folder and name; score them one by one")

    def tasks_of(model):
        view = CenterCrop.of(model.preprocessing)
        return [open_task(name, view, catalog, labels, templates) for name in names]

    for path in args.resume[1:]:  # their faults are told before the first is scored
        open_model(path)
    for path in args.resume:
        check_results(folder_of(path, args), "results", "examples")
    for path in args.resume:
        evaluate_checkpoint(path, tasks_of, device, args)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
