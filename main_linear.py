"""Classifiers on the frozen image tower of a checkpoint: linear probe, logistic regression, k-NN.

    torchrun --nproc-per-node 8 main_linear.py --pretrained runs/slip/checkpoint_best.pt
    python main_linear.py --pretrained slip_base_100ep.pt --dataset food101 --classifier knn

The linear probe is the paper's (arXiv:2112.12750, section 4.1, after MoCo v3): SGD on augmented
images. The others take the features of train and test split once, and keep them on disk.
Results go to linear.json, logistic.json and knn-K.json in --output-dir, by set.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import datasets
import engine
import features
import layers
import pretrained
import utils
import warmup
from catalog import (
    LabelledViews,
    Views,
    add_set_flags,
    dummy_batch,
    fingerprint,
    load_catalog,
    open_splits,
)
from evaluation import (
    METRICS,
    Evaluation,
    check_results,
    display_names,
    rank_set,
    report_score,
    summarize,
    top1,
)
from infra import devices, distributed
from infra.run import Run
from towers import blocks_of
from transforms import CenterCrop, CropAndFlip
from utils import InputError, natural, not_negative, positive, positive_int


def get_args_parser():
    parser = utils.ArgumentParser("main_linear.py", "Classifiers on a frozen image tower")
    add = add_set_flags(parser)
    add("--output-dir", default="./", help="folder of results, features and the probe")

    add = parser.add_argument_group("Model").add_argument
    pretrained.add_weights_flags(add)
    add("--image-size", type=positive_int, help="pixels; by default those of the weights")
    add("--classifier", default="linear", choices=CLASSIFIERS)
    add("--k", default=(20, 200), nargs="+", type=positive_int, help="knn: neighbours that vote")
    coldest = utils.number(float, features.COLDEST)
    add("--temperature", default=0.07, type=coldest, help="knn: of the votes")

    add = parser.add_argument_group("Optimization (linear)").add_argument
    add("--epochs", default=90, type=positive_int)
    add("-b", "--batch-size", default=128, type=positive_int, help="images per rank")
    add("--lr", default=0.1, type=positive, help="base learning rate, see --lr-scaling")
    add("--lr-scaling", default="archived", choices=LR_SCALINGS, help="global: MoCo v3's")
    add("--momentum", default=0.9, type=not_negative)
    add("--wd", default=0.0, type=not_negative, help="weight decay")

    add("--crop-min", default=0.08, type=utils.number(float, 0, 1), help="least area of a crop")
    add("--no-flip", action="store_true", help="for images that have a left and a right, as text")

    add = devices.add_system_flags(parser)
    engine.add_training_flags(add)
    warmup.add_compile_flags(add)
    add("--evaluate", action="store_true", help="linear: score the probe in --output-dir and stop")
    add("--seed", default=0, type=natural)
    return parser


def archived_lr(args, world_size):
    """The archived code divided the batch of one GPU by the number of GPUs: 0.00625 on 8."""
    return args.lr * int(args.batch_size / world_size) / 256


def global_lr(args, world_size):
    return args.lr * args.batch_size * world_size / 256


LR_SCALINGS = {"archived": archived_lr, "global": global_lr}

# A probe resumes, or is done, with equal flags: its learning rate depends on the rest.
FIXED = ("lr", "lr_scaling", "momentum", "wd", "epochs", "crop_min", "no_flip", "seed")
FIXED += ("image_size", "effective_batch", "effective_lr")


# ---------------------------------------------------------------------------------------------
# The linear probe


class Probe(nn.Module):
    """A frozen image tower, always in evaluation mode, and a linear head on its features."""

    def __init__(self, model, classes):
        super().__init__()
        self.tower, self.normalize = model.visual.requires_grad_(False), model.normalize
        self.head = nn.Linear(model.num_features, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, image, label):
        return {"logits": self.classify(image), "label": label}

    def classify(self, image):
        """(B, 3, S, S) normalised -> (B, C) float32."""
        with torch.no_grad():
            embed = self.tower(image).float()
        with torch.autocast(image.device.type, enabled=False):
            return self.head(embed)

    def score(self, test, evaluation):
        """The evaluation.Ranking of a labelled set."""
        self.eval()
        with torch.compiler.set_stance("force_eager"):  # as --evaluate
            return rank_set(
                lambda images: self.classify(self.normalize(images)),
                self.head.out_features,
                test,
                evaluation,
            )


def probe_loss(outputs):
    logits, label = outputs["logits"], outputs["label"]
    hits = (logits.argmax(-1) == label).float().mean()
    return {"loss": F.cross_entropy(logits, label), "acc1": 100 * hits}


def create_training(probe, precision, updates, args):
    """SGD on the head; the rate is constant within an epoch and follows half a cosine over them.

    Args:
        probe: on its device.
        precision: devices.Precision.
        updates: of an epoch.
        args: the flags.
    """
    warmup.check_flags(args, precision.device)
    world_size = distributed.get_world_size()
    lr = LR_SCALINGS[args.lr_scaling](args, world_size)
    if not lr:
        raise InputError(
            f"--batch-size {args.batch_size} on {world_size} ranks gives a learning rate of 0 by "
            "the archived rule; give --lr-scaling global"
        )
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(args.epochs) / args.epochs))
    return engine.Training(
        model=distributed.wrap_ddp(probe, precision.device),
        criterion=probe_loss,
        optimizer=torch.optim.SGD(
            probe.head.parameters(),
            lr,
            momentum=args.momentum,
            weight_decay=args.wd,
            # With a scaler, the other kernels wait for the device in every update.
            fused=precision.scaler.is_enabled() or None,
        ),
        schedule=np.repeat(lr * cosine, updates),
        precision=precision,
        skip_nonfinite=args.skip_nonfinite,
        prepare=lambda batch: batch | {"image": probe.normalize(batch["image"])},
    )


def check_frozen(tower, before):
    """Raises RuntimeError if training changed anything but the head."""
    if keys := layers.changed(before, layers.digests(tower.state_dict())):
        raise RuntimeError(f"the frozen tower was changed: {keys[0]}")


def train_probe(model, digest, splits, precision, args):
    """Trains the probe, or resumes an unfinished one of --output-dir.

    Args:
        model: the pretrained models.Method on its device.
        digest: of its weights.
        splits: (training set, test set, class names).
        precision: devices.Precision.
        args: the flags.

    Returns (its evaluation.Ranking of the test set, epochs).
    """
    train, test, names = splits
    size, form = model.image_size, model.preprocessing
    test = Views(test, CenterCrop.of(form, round(size * 256 / 224)))
    view = CropAndFlip(size, args.crop_min, not args.no_flip, form.interpolation)
    loader = datasets.open_loader(
        LabelledViews(train, view, args.seed), args.batch_size, args.workers, precision.device
    )
    probe = Probe(model, len(names)).to(precision.device)
    training = create_training(probe, precision, len(loader), args)

    folder = os.path.join(args.output_dir, f"linear-{args.dataset}")
    parts, lr = {"state_dict": probe.head}, float(training.schedule[0])
    with Run(folder, training, args, parts, digest, effective_lr=lr) as run:
        run.resume(check="--dataset", fixed=() if args.evaluate else FIXED)
        evaluation = Evaluation(precision, args.batch_size, args.workers, run.poll)
        if args.evaluate and run.is_new:
            raise InputError(f"--evaluate: {run.checkpoints.latest} is absent; train the probe")
        if args.evaluate:
            return probe.score(test, evaluation), run.state.epoch

        before = layers.digests(probe.tower.state_dict())
        run.start()
        run.log.info(
            f"{args.dataset}: {len(train)} images of {len(names)} classes, {len(loader)} updates "
            f"an epoch; learning rate {lr:g} by the {args.lr_scaling} rule"
        )
        batch = dummy_batch(args.batch_size, size, precision.device)
        warmup.warm_up(training, blocks_of(probe.tower), [batch], run.log, args)
        is_done = run.state.epoch >= args.epochs
        ranking = probe.score(test, evaluation) if is_done else None
        for _ in run.epochs(args.epochs):
            # train the head, on all ranks
            means, speed = engine.train_one_epoch(training, loader, run, args.print_freq)
            stats = {f"train_{key}": value for key, value in means.items()} | speed
            stats["lr"] = training.optimizer.param_groups[0]["lr"]

            # score the test set
            ranking = probe.score(test, evaluation)
            summary = summarize(args.dataset, ranking)
            run.state.best_acc1 = max(run.state.best_acc1, summary["accuracy"])
            stats |= {"test_acc1": summary["acc1"], "test_acc5": summary["acc5"]}
            run.end_epoch(stats)
    check_frozen(probe.tower, before)
    return ranking, run.state.epoch


# ---------------------------------------------------------------------------------------------
# All classifiers: {name of the result: (its evaluation.Ranking, further facts)}


def classify_linear(model, digest, splits, precision, args):
    ranking, epochs = train_probe(model, digest, splits, precision, args)
    return {"linear": (ranking, {"epochs": epochs})}


def extract_splits(model, digest, splits, precision, args):
    """Features of the training and the test split, seen as for zero-shot classification."""
    train, test, _ = splits
    view, evaluation = (
        CenterCrop.of(model.preprocessing),
        Evaluation(precision, args.batch_size, args.workers),
    )
    results = []
    sets = load_catalog(args.catalog, args.allow_outside_root)
    for split, images in (("train", train), ("test", test)):
        content = distributed.broadcast_object(
            distributed.is_main_process()
            and fingerprint(args.dataset, sets, split == "train", images)
        )
        key = features.cache_key(digest, vars(view), content, precision.name)
        path = os.path.join(args.output_dir, "features", f"{args.dataset}-{split}-{key}")
        results += features.extract(
            lambda images: model.visual(model.normalize(images)),
            model.num_features,
            Views(images, view),
            path,
            evaluation,
        )
    return results


def classify_logistic(model, digest, splits, precision, args):
    train, train_labels, test, test_labels = extract_splits(model, digest, splits, precision, args)
    metric = METRICS.get(args.dataset, top1)
    weights, c = features.fit_with_search(
        train, train_labels, len(splits[2]), metric, precision.device, args.seed
    )
    return {"logistic": (features.rank_linear(test, test_labels, weights), {"C": c})}


def classify_knn(model, digest, splits, precision, args):
    data = extract_splits(model, digest, splits, precision, args)
    rankings = features.knn_rankings(
        *data, len(splits[2]), args.k, args.temperature, precision.device
    )
    facts = {"temperature": args.temperature}
    return {f"knn-{k}": (ranking, {"k": k, **facts}) for k, ranking in rankings.items()}


CLASSIFIERS = {"linear": classify_linear, "logistic": classify_logistic, "knn": classify_knn}


def main(args):
    device = distributed.init_distributed(args.device, args.dist_url, args.deterministic)
    utils.seed_everything(args.seed)

    weights = pretrained.open_weights(args.pretrained, args.arch)
    model = weights.build(args.image_size).to(device)
    precision = devices.Precision(args.precision, device)
    train, test, labels = open_splits(
        args.dataset,
        args.catalog,
        args.labels,
        args.allow_outside_root,
        args.ignore_folder_names,
    )
    names = display_names(labels)
    kinds = [f"knn-{k}" for k in args.k] if args.classifier == "knn" else [args.classifier]
    check_results(args.output_dir, *kinds)

    classify, splits = CLASSIFIERS[args.classifier], (train, test, names)
    results = classify(model, weights.digest(), splits, precision, args)
    for name, (ranking, facts) in results.items() if distributed.is_main_process() else ():
        facts |= {"checkpoint": args.pretrained}
        report_score(args.output_dir, name, args.dataset, ranking, names, facts)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
