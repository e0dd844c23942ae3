"""End-to-end fine-tuning of a checkpoint's ViT on a labelled set, by BeiT's recipe.

    torchrun --nproc-per-node 8 main_finetune.py --pretrained slip_base_100ep.pt --preset base
    torchrun --nproc-per-node 8 main_finetune.py --pretrained slip_large.pt --preset large

A plain ViT that classifies by its class token (arXiv:2112.12750, section 4.1; Bao et al., 2021),
with timm's augmentation, Mixup and average of weights. The learning rate is that of the whole
batch, 1024 in the paper. The result goes to finetune.json in --output-dir, by set.
"""

import argparse
import os

import timm.data
import timm.loss
import torch
from PIL import ImageOps
from torch import nn

import datasets
import engine
import optimization
import pretrained
import utils
import warmup
from catalog import LabelledViews, Views, add_set_flags, dummy_batch, open_splits
from evaluation import Evaluation, check_results, display_names, rank_set, report_score, top1
from infra import devices, distributed
from infra.run import Run
from towers import blocks_of
from transforms import CenterCrop, normalize, to_unit
from utils import InputError, natural, not_negative, positive, positive_int

PRESETS = {
    "small": {"epochs": 100, "warmup_epochs": 20, "layer_decay": 0.65, "drop_path": 0.0},
    "base": {"epochs": 100, "warmup_epochs": 20, "layer_decay": 0.65, "drop_path": 0.1},
    "large": {"epochs": 50, "warmup_epochs": 5, "layer_decay": 0.75, "drop_path": 0.1},
}

# A run resumes with equal flags: its schedule is laid out for all of it.
FIXED = ("preset", "epochs", "warmup_epochs", "layer_decay", "drop_path", "lr", "warmup_lr")
FIXED += ("min_lr", "weight_decay", "clip_grad", "aa", "color_jitter", "no_flip", "crop_min")
FIXED += ("reprob", "mixup", "cutmix", "smoothing", "seed", "effective_batch")


class PresetParser(utils.ArgumentParser):
    """Flags that are not given take the preset's values."""

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        given = {key: value for key, value in vars(args).items() if value is not None}
        return argparse.Namespace(**{**vars(args), **PRESETS[args.preset], **given})


def get_args_parser():
    parser = PresetParser("main_finetune.py", "Fine-tuning of a ViT, by BeiT's recipe")
    add = add_set_flags(parser)
    add("--output-dir", default="./", help="folder of the result, checkpoint and logs")

    add = parser.add_argument_group("Model").add_argument
    pretrained.add_weights_flags(add)
    add("--preset", default="base", choices=PRESETS, help="sets four flags, which it prints")
    add("--input-size", type=positive_int, help="pixels; by default those of pre-training")
    text = "side of a test image's crop as a share of its resized side; by default 224/256 or, "
    text += "from 384 pixels on, 1"
    add("--crop-pct", type=utils.number(float, 0.01, 1.0001), help=text)
    add("--drop-path", type=utils.number(float, 0, 1), help="stochastic depth of the last block")
    add("--model-ema", action="store_true", help="also keep and score an average of the weights")
    add("--model-ema-decay", default=0.9999, type=utils.number(float, 0, 1))

    add = parser.add_argument_group("Optimization").add_argument
    add("--epochs", type=positive_int)
    add("--warmup-epochs", type=natural)
    add("--batch-size", default=128, type=positive_int, help="images per rank and micro-batch")
    add("--update-freq", default=1, type=positive_int, help="micro-batches per update")
    add("--lr", default=4e-3, type=positive, help="peak learning rate of the head")
    add("--warmup-lr", default=1e-6, type=not_negative, help="at the start of warm-up")
    add("--min-lr", default=1e-6, type=not_negative, help="at the end of the cosine")
    add("--layer-decay", type=positive, help="factor of the rate from each block to the one below")
    add("--weight-decay", default=0.05, type=not_negative)
    add("--clip-grad", default=0.0, type=not_negative, help="largest gradient norm; 0: any")

    add = parser.add_argument_group("Augmentation").add_argument
    add("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment by timm's name, or none")
    add("--color-jitter", default=0.4, type=not_negative, help="if --aa is none")
    add("--no-flip", action="store_true", help="for images that have a left and a right, as text")
    add("--crop-min", default=0.08, type=utils.number(float, 0, 1), help="least area of a crop")
    add("--reprob", default=0.25, type=not_negative, help="probability of random erasing")
    add("--mixup", default=0.8, type=not_negative, help="alpha; 0: off")
    add("--cutmix", default=1.0, type=not_negative, help="alpha; 0: off")
    add("--smoothing", default=0.1, type=utils.number(float, 0, 1), help="of the labels")

    add = devices.add_system_flags(parser)
    engine.add_training_flags(add)
    warmup.add_compile_flags(add)
    add("--eval-freq", default=1, type=positive_int, help="epochs between two scorings")
    add("--evaluate", action="store_true", help="score the checkpoint in --output-dir and stop")
    add("--seed", default=0, type=natural)
    return parser


# ---------------------------------------------------------------------------------------------
# Model


class Classifier(nn.Module):
    """A ViT with a head, and the form in which its tower wants images.

    vit: timm's VisionTransformer; preprocessing: its Preprocessing.
    """

    def __init__(self, vit, preprocessing):
        super().__init__()
        self.vit, self.preprocessing = vit, preprocessing
        self.image_size = preprocessing.image_size

    def forward(self, image, label):
        return {"logits": self.vit(image).float(), "label": label}

    def score(self, vit, test, evaluation):
        """The evaluation.Ranking of a set by `vit`: its own, or an average of its weights."""
        vit.eval()

        def classify(images):
            form = self.preprocessing
            return vit(normalize(to_unit(images), form.mean, form.std))

        with torch.compiler.set_stance("force_eager"):  # as --evaluate
            return rank_set(classify, self.vit.num_classes, test, evaluation)


# ---------------------------------------------------------------------------------------------
# Data and loss


def posterize(image, bits, **_):
    """timm's operation asks now and then for 0 bits, which Pillow no longer takes."""
    return ImageOps.posterize(image, max(1, bits)) if bits < 8 else image


def resized_side(size, crop_pct=None):
    """Pixels of a test image's shorter side, of which the middle `size` are seen (BeiT's rule)."""
    return int(size / (crop_pct or (224 / 256 if size < 384 else 1.0)))


class TimmView:
    """timm's training augmentation of a PIL image, drawing from the given generator alone."""

    def __init__(self, preprocessing, args):
        size, mean, std = preprocessing.image_size, preprocessing.mean, preprocessing.std
        options = {"mean": mean, "std": std, "interpolation": "bicubic"}
        options |= {"scale": (args.crop_min, 1.0), "hflip": 0.0 if args.no_flip else 0.5}
        options |= {"color_jitter": args.color_jitter, "re_prob": args.reprob, "re_mode": "pixel"}
        options["auto_augment"] = None if args.aa == "none" else args.aa
        try:
            self.transform = timm.data.create_transform(size, is_training=True, **options)
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"--aa {args.aa!r} is no augmentation of timm's, as rand-m9-mstd0.5-inc1: {error}"
            ) from error
        for step in self.transform.transforms:
            for operation in getattr(step, "ops", ()):  # RandAugment's
                if operation.aug_fn is timm.data.auto_augment.posterize:
                    operation.aug_fn = posterize

    def __call__(self, image, rng):
        with utils.seeded(int(rng.integers(2**32))):
            return self.transform(image)


def create_criterion(args, classes):
    """(prepare, criterion): Mixup runs on the device; its labels are probabilities."""
    mixup = None
    if args.mixup or args.cutmix:
        if args.batch_size % 2:
            raise InputError(f"--batch-size {args.batch_size}: Mixup takes pairs; make it even")
        mixup = timm.data.Mixup(
            args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes
        )
    soft = timm.loss.SoftTargetCrossEntropy()
    hard = nn.CrossEntropyLoss(label_smoothing=args.smoothing)

    def prepare(batch):
        image, label = mixup(batch["image"], batch["label"]) if mixup else batch.values()
        return {"image": image, "label": label}

    def criterion(outputs):
        return {"loss": (soft if mixup else hard)(outputs["logits"], outputs["label"])}

    return prepare, criterion


# ---------------------------------------------------------------------------------------------
# Training


def create_training(model, precision, updates, args):
    """Loss, optimizer, schedule and average of weights.

    Args:
        model: the Classifier on its device.
        precision: devices.Precision.
        updates: of an epoch.
        args: the flags.

    Returns engine.Training.
    """
    warmup.check_flags(args, precision.device)
    vit = model.vit
    prepare, criterion = create_criterion(args, vit.num_classes)
    return engine.Training(
        model=distributed.wrap_ddp(model, precision.device),
        criterion=criterion,
        optimizer=torch.optim.AdamW(
            optimization.layer_groups(vit, args.weight_decay, args.layer_decay),
            args.lr,
            (0.9, 0.999),
            fused=True,
        ),
        schedule=optimization.cosine_scheduler(
            args.lr, args.min_lr, args.epochs, updates, args.warmup_epochs, args.warmup_lr
        ),
        precision=precision,
        update_freq=args.update_freq,
        skip_nonfinite=args.skip_nonfinite,
        clip_grad_norm=args.clip_grad,
        prepare=prepare,
        average=optimization.Average(vit, args.model_ema_decay if args.model_ema else None),
    )


def resume(run, average, args):
    """Restores the run."""
    fixed = ("preset",) if args.evaluate else FIXED
    run.resume(check="--dataset and --input-size", fixed=fixed)
    latest = run.checkpoints.latest
    if args.evaluate and run.is_new:
        raise InputError(f"--evaluate: {latest} is absent; train first")
    if args.evaluate and "ema" in run.checkpoints.absent:
        raise InputError(f"--model-ema: {latest} holds no average; omit the flag")
    average.start_if_absent(run)


def train(run, training, loader, score, args):
    """The epochs that are left; score() -> the evaluation.Ranking of the test set."""
    run.start()
    preset = " ".join(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in PRESETS["base"])
    run.log.info(f"--preset {args.preset}: {preset}")
    updates, batch = len(loader) // args.update_freq, run.facts["effective_batch"]
    run.log.info(f"{args.dataset}: {loader.images} images, {updates} updates an epoch of {batch}")
    model = getattr(training.model, "module", training.model)
    size, device = model.image_size, training.precision.device
    label = torch.zeros(args.batch_size, model.vit.num_classes, device=device)  # as Mixup's
    views = dummy_batch(args.batch_size, size, device) | {"label": label}
    warmup.warm_up(training, blocks_of(model.vit), [views], run.log, args)
    for epoch in run.epochs(args.epochs):
        means, speed = engine.train_one_epoch(training, loader, run, args.print_freq)
        stats = {f"train_{key}": value for key, value in means.items()} | speed
        if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
            stats["test_acc1"] = top1(score())
        run.end_epoch(stats)


def main(args):
    device = distributed.init_distributed(args.device, args.dist_url, args.deterministic)
    utils.seed_everything(args.seed)

    train_set, test, labels = open_splits(
        args.dataset,
        args.catalog,
        args.labels,
        args.allow_outside_root,
        args.ignore_folder_names,
    )
    names = display_names(labels)
    check_results(args.output_dir, "finetune", *(["finetune-ema"] if args.model_ema else []))
    weights = pretrained.open_weights(args.pretrained, args.arch)
    vit, form = weights.build_vit(len(names), args.drop_path, args.input_size)
    model = Classifier(vit.to(device), form)
    size = model.image_size
    test = Views(test, CenterCrop(size, resized_side(size, args.crop_pct), "bicubic"))
    views = LabelledViews(train_set, TimmView(form, args), args.seed)
    loader = datasets.open_loader(views, args.batch_size, args.workers, device, args.update_freq)

    precision = devices.Precision(args.precision, device)
    training = create_training(model, precision, len(loader) // args.update_freq, args)
    average = training.average
    folder = os.path.join(args.output_dir, f"finetune-{args.dataset}")
    parts = {"state_dict": vit} | average.parts()
    with Run(folder, training, args, parts, weights.digest()) as run:
        resume(run, average, args)
        evaluation = Evaluation(precision, args.batch_size, args.workers, run.poll)
        if not args.evaluate:
            train(run, training, loader, lambda: model.score(vit, test, evaluation), args)
        results = {"finetune": model.score(vit, test, evaluation)}
        if average:
            results["finetune-ema"] = model.score(average.module, test, evaluation)

    for name, ranking in results.items() if distributed.is_main_process() else ():
        facts = {"epochs": run.state.epoch, "input_size": size, "preset": args.preset}
        facts |= {"checkpoint": args.pretrained}
        report_score(args.output_dir, name, args.dataset, ranking, names, facts)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
