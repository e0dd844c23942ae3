"""Zero-shot classification: prompts -> text classifier -> metric, for the sets of the catalog.

    python eval_zeroshot.py --resume checkpoint_best.pt --datasets imagenet cifar10
    torchrun --nproc-per-node 8 eval_zeroshot.py --resume checkpoint_best.pt

Protocol of the paper (arXiv:2112.12750, section 4.1; the metrics are CLIP's).
Shapes: C classes, D joint embedding, n images of a set.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import datasets
import engine
import utils
from checkpoint import load_model
from tokenizer import SimpleTokenizer, trim
from transforms import CenterCrop, to_float
from utils import InputError, natural, positive_int

# ---------------------------------------------------------------------------------------------
# Metrics, in percent: (top (n, K) best classes first, margin (n,) score of class 1 over 0, labels)


def top1(top, margin, labels):
    return 100 * (top[:, 0] == labels).double().mean().item()


def top5(top, margin, labels):
    return 100 * (top == labels[:, None]).any(1).double().mean().item()


def mean_per_class(top, margin, labels):
    """The mean, over the classes that occur, of the accuracy on their images."""
    hits = (top[:, 0] == labels).double()
    counts = labels.bincount()
    return 100 * (labels.bincount(hits)[counts > 0] / counts[counts > 0]).mean().item()


def mean_top1_top5(top, margin, labels):
    return (top1(top, margin, labels) + top5(top, margin, labels)) / 2


def roc_auc(top, margin, labels):
    """Of two classes: how often an image of class 1 has the larger margin."""
    from sklearn.metrics import roc_auc_score

    return 100 * roc_auc_score(labels, margin)


METRICS = {  # every other set: top1
    "aircraft": mean_per_class,
    "pets": mean_per_class,
    "caltech101": mean_per_class,
    "flowers": mean_per_class,
    "kinetics700_frames": mean_top1_top5,
    "hateful_memes": roc_auc,
}


# ---------------------------------------------------------------------------------------------
# One set


@dataclass
class Task:
    """A labelled set, its class names (each a str or a list of synonyms) and its prompts."""

    name: str
    dataset: Dataset
    split: str
    classes: list
    templates: list


def open_task(name, image_size, catalog, labels, templates):
    """Raises InputError if the set, its labels or its prompts are absent or do not fit."""
    for what, table in (
        ("the catalog", catalog),
        ("the labels", labels),
        ("the templates", templates),
    ):
        if name not in table:
            raise InputError(f"{name!r} is not in {what}; choose from {', '.join(table)}")
    if not isinstance(labels[name], list) or not isinstance(templates[name], list):
        raise InputError(f"labels and templates of {name!r} must be lists of texts")
    if not all(isinstance(template, str) and "{}" in template for template in templates[name]):
        raise InputError(f"templates of {name!r}: each must be a text with {{}} for the class")
    dataset = datasets.get_downstream_dataset(
        catalog, name, is_train=False, transform=CenterCrop(image_size), labels=labels[name]
    )
    split = datasets.split_name(catalog[name], is_train=False)
    return Task(name, dataset, split, labels[name], templates[name])


@torch.no_grad()
def build_classifier(model, tokenizer, classes, templates, precision, batch_size=256):
    """(C, D) unit rows: per class the mean of its prompts' unit embeddings, normalised again."""
    prompts, owners = [], []
    for owner, names in enumerate(classes):
        for name in [names] if isinstance(names, str) else names:
            prompts += [template.replace("{}", name) for template in templates]
            owners += [owner] * len(templates)
    embeds = []
    for start in range(0, len(prompts), batch_size):
        text = trim(tokenizer(prompts[start : start + batch_size])).to(precision.device)
        with precision.autocast():
            embeds.append(F.normalize(model.encode_text(text).float(), dim=-1))
    embeds = torch.cat(embeds)
    sums = embeds.new_zeros(len(classes), embeds.shape[1])
    sums.index_add_(0, torch.tensor(owners, device=sums.device), embeds)
    return F.normalize(sums, dim=-1)


def evaluate(model, task, tokenizer, precision, batch_size=256, workers=10):
    """Zero-shot scores on a task, in percent: its protocol's metric as `accuracy`, acc1, acc5."""
    model.eval()
    classifier = build_classifier(model, tokenizer, task.classes, task.templates, precision)
    k = min(5, len(task.classes))

    def score(images):
        embed = F.normalize(model.encode_image(to_float(images)).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            similarity = embed @ classifier.T  # (B, C)
        margin = similarity[:, 1:2] - similarity[:, :1]
        return torch.cat([similarity.topk(k).indices, margin], dim=1)

    scores, labels = engine.predict(score, k + 1, task.dataset, precision, batch_size, workers)
    top, margin = scores[:, :k].long(), scores[:, k]
    metric = METRICS.get(task.name, top1)
    return {
        "accuracy": metric(top, margin, labels),
        "metric": metric.__name__,
        "acc1": top1(top, margin, labels),
        "acc5": top5(top, margin, labels),
        "split": task.split,
        "images": len(labels),
        "classes": len(task.classes),
        "prompts": len(task.templates),
    }


# ---------------------------------------------------------------------------------------------
# Command line


def get_args_parser():
    parser = utils.ArgumentParser("eval_zeroshot.py", "Zero-shot accuracy of a checkpoint")
    parser.add_argument("--resume", required=True, help="checkpoint file, ours or a released one")
    parser.add_argument("--output-dir", default="./", help="where results.json is written")
    parser.add_argument("--datasets", nargs="+", help="sets to score; those present if not given")
    parser.add_argument("--catalog", default=datasets.CATALOG, help="where the sets lie (JSON)")
    parser.add_argument("--labels", default=datasets.LABELS, help="class names (JSON)")
    parser.add_argument("--templates", default=datasets.TEMPLATES, help="prompts (JSON)")
    parser.add_argument(
        "--batch-size", default=256, type=positive_int, help="images per rank and step"
    )
    parser.add_argument(
        "-j", "--workers", default=10, type=natural, help="loader processes per rank"
    )
    parser.add_argument("--precision", choices=engine.PRECISIONS, help="see main.py")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dist-url", default="env://", help="where the ranks meet")
    return parser


def choose_sets(names, catalog):
    """The named sets, or all that are present; the absent ones are reported, not passed over."""
    if names:
        return names
    present = [name for name, entry in catalog.items() if datasets.is_present(entry)]
    if not present:
        raise InputError("no set of the catalog is present; change its paths or give --catalog")
    if utils.is_main() and len(present) < len(catalog):
        print("absent, not scored:", ", ".join(n for n in catalog if n not in present))
    return present


def main(args):
    device = utils.init_distributed(args.device, args.dist_url)

    model, train_args = load_model(args.resume)
    if "text" not in model.views:
        raise InputError(f"{args.resume} holds {train_args.model}: it has no text to prompt")
    model.to(device)
    precision = engine.Precision(args.precision, device)

    catalog = datasets.load_catalog(args.catalog)
    labels = utils.read_json(args.labels, "labels")
    templates = utils.read_json(args.templates, "templates")
    names = choose_sets(args.datasets, catalog)
    tasks = [open_task(name, model.image_size, catalog, labels, templates) for name in names]

    if utils.is_main():
        utils.make_folder(args.output_dir)
    tokenizer, results = SimpleTokenizer(), {}
    for task in tasks:
        result = evaluate(model, task, tokenizer, precision, args.batch_size, args.workers)
        results[task.name] = result
        if utils.is_main():
            print(
                f"{task.name:20s} {result['accuracy']:6.2f}  {result['metric']:14s} "
                f"{result['images']:6d} images of {task.split}",
                flush=True,
            )
            utils.write_json(os.path.join(args.output_dir, "results.json"), results)


if __name__ == "__main__":
    utils.run(lambda: main(get_args_parser().parse_args()))
