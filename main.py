"""Pre-training of CLIP, SimCLR and SLIP models (arXiv:2112.12750).

    torchrun --nproc-per-node 8 main.py --dataset cc3m --root CC3M --metadata cc3m.npy \\
        --model SLIP_VITB16 --output-dir runs/slip --epochs 40
    python main.py --device cpu ...  # one process, any machine
"""

import os
from dataclasses import replace

import torch
from torchvision.utils import make_grid

import advice
import captions
import catalog
import contrast
import datasets
import engine
import initial
import lanes
import layers
import losses
import models
import optimization
import stream_shards
import utils
import warmup
from evaluation import Evaluation
from infra import devices, distributed
from infra.run import Run
from transforms import IMAGE_VIEWS, to_unit
from utils import InputError, natural, not_negative, number, positive_int
from validation import add_validation_flags, evaluate_only, open_validation, validate

# Flags and facts that a resumed run keeps.
FIXED = ("init_from", "image_size", "text_model", "preprocessing", "clip_loss")
FIXED += ("lock_image", "lock_image_unlocked_groups", "lock_text", "lock_text_unlocked_layers")


def get_args_parser():
    parser = utils.ArgumentParser("main.py", "Pre-training of CLIP, SimCLR and SLIP models")
    add = parser.add_argument_group("Data").add_argument
    add("--dataset", default="yfcc15m", help=f"one of {', '.join(captions.SOURCES)}")
    add("--root", default="", help="folder of the images")
    add("--metadata", default="yfcc15m.pkl", help="captions: .arrow, an archived format, tars")
    add("--csv-img-key", default="filepath", help="image column of --dataset csv")
    add("--csv-caption-key", default="title", help="caption column of --dataset csv")
    add("--json-caption-key", default=[], nargs="+", help="fields of .json in --dataset webdataset")
    add("--shuffle-window", default=16, type=natural, help="shards shuffled together; 0: all")
    stream_shards.add_stream_flags(add)
    add("--augment", choices=("cpu", "device"), help="by default device on CUDA, else cpu")
    add("--archived-pixels", action="store_true", help="ignore EXIF's turns and transparency")
    add("--max-bad-fraction", default=0.01, type=number(float, 0, 1), help="of unreadable images")
    catalog.add_outside_flag(add)
    add_validation_flags(add)
    add("--output-dir", default="./", help="folder of checkpoints and logs")
    add("--name", help="of the run: its folder is LOGS/NAME instead of --output-dir")
    add("--logs", help="folder of named runs; by default logs")

    add = parser.add_argument_group("Model").add_argument
    add("--model", default="SLIP_VITB16", help="METHOD_TOWER: CLIP_VITS16, SLIP_convnext_tiny")
    add("--ssl-mlp-dim", default=4096, type=positive_int, help="SimCLR head: hidden width")
    add("--ssl-emb-dim", default=256, type=positive_int, help="SimCLR head: output width")
    losses.add_loss_flags(add)
    add("--image-size", type=positive_int, help="pixels of a side; by default the tower's")
    add("--text-model", default="", help="of transformers, instead of CLIP's: a folder or a name")
    text = "share of a ViT's patches, below 1, that training leaves out"
    add("--patch-dropout", default=0.0, type=number(float, 0, 1), help=text)
    text = "weights to start from: a file, NAME:TAG, see docs/weights.md"
    add("--init-from", default="", help=text)
    add("--resume", default="", help="checkpoint to resume; output-dir's own comes first")
    layers.add_lock_flags(add)

    add = optimization.add_optimization_flags(parser)
    add("--batch-size", default=64, type=positive_int, help="samples per rank and micro-batch")
    add("--update-freq", default=1, type=positive_int, help="micro-batches per update")
    add("--accum", default="plain", choices=("plain", "exact"), help="exact: as one large batch")
    add("--clip-grad-norm", default=0.0, type=not_negative, help="largest gradient norm; 0: any")

    add = devices.add_system_flags(parser)
    add("--disable-amp", action="store_true", help="the same as --precision fp32")
    add("--grad-checkpointing", action="store_true", help="less memory for a third more time")
    text = "sum gradients over ranks in bf16: half the traffic, rounded to 8 bits"
    add("--bf16-gradients", action="store_true", help=text)
    engine.add_training_flags(add)
    warmup.add_compile_flags(add)
    add("--eval-freq", default=1, type=positive_int, help="epochs between two validations")
    add("--evaluate", action="store_true", help="validate the checkpoint and stop")
    add("--seed", default=0, type=natural)
    return parser


def output_folder(args):
    """--output-dir or, of a run with a --name, the folder of that name in --logs."""
    if args.name is None:
        if args.logs is not None:
            raise InputError(f"--logs {args.logs}: the run in it has no name; give --name as well")
        return args.output_dir
    if args.output_dir != "./":
        raise InputError(f"--name {args.name} and --output-dir {args.output_dir}: give one of them")
    if os.path.basename(args.name) != args.name or args.name in ("", ".", ".."):
        raise InputError(f"--name {args.name!r} is no name of a folder; put the path into --logs")
    return os.path.join("logs" if args.logs is None else args.logs, args.name)


def create_model(args):
    """(model, notes): randomly initialised, but for --text-model and what --init-from shares."""
    latest = os.path.join(output_folder(args), "checkpoint.pt")
    weights = initial.open_initial_weights(args.init_from, args.model, latest)
    text_model = initial.find_text_model(
        args.text_model, args.model, weights, (latest, args.resume)
    )
    # Positions are resampled to the size of this run.
    form = weights and replace(weights.tower.preprocessing, image_size=None)
    sizes, tokens = (args.ssl_mlp_dim, args.ssl_emb_dim), (args.image_size, args.patch_dropout)
    model = models.create_model(args.model, *sizes, form, *tokens, text_model)
    contrasted = args.batch_size * distributed.get_world_size()
    contrasted *= args.update_freq if args.accum == "exact" else 1
    losses.add_bias(model, args.clip_loss, args.init_logit_bias, contrasted)
    notes = model.text.load_pretrained() if text_model else []
    return model, notes + ([weights.initialise(model)] if weights else [])


# ---------------------------------------------------------------------------------------------
# Data


def open_loader(model, device, args):
    """The loader of one rank: whole updates of whole batches, shuffled anew every epoch."""
    augment = args.augment or ("device" if device.type == "cuda" else "cpu")
    form = model.preprocessing, args.seed, augment, args.allow_outside_root, args.archived_pixels
    if "aug1" in model.views and args.batch_size * distributed.get_world_size() == 1:
        raise InputError("--batch-size 1 is too few for the SimCLR head's batch norm; raise it")
    collate = datasets.Collate(getattr(model, "tokenizer", None))
    shape = args.batch_size, args.workers, device, args.update_freq, collate
    views = (*model.views, *contrast.extra_views(args.duplicates))

    weights = args.dataset_resampled, args.train_data_upsampling_factors
    length, keys = args.train_num_samples, args.json_caption_key
    if stream := stream_shards.open_stream(args.dataset, args.metadata, keys, length, *weights):
        dataset = lanes.StreamDataset(stream, views, *form)
        return lanes.open_loader(dataset, *shape)
    columns = args.csv_img_key, args.csv_caption_key, *keys
    pairs = distributed.rank_zero_first(
        lambda: captions.load_captions(args.dataset, args.metadata, columns)
    )
    dataset = datasets.CaptionDataset(pairs, args.root or pairs.root, views, *form)
    order = datasets.window_order(pairs.lengths, args.shuffle_window)
    return datasets.open_loader(dataset, *shape, order)


def picture_of_views(model, loader, columns=8):
    """A grid (3, height, width) of the first samples: a row for each image view."""
    batch = loader.preview(columns)
    views = [to_unit(batch[v], batch["steps"].get(v)) for v in model.views if v != "text"]
    return make_grid(torch.cat(views), nrow=columns)


# ---------------------------------------------------------------------------------------------
# Training


def create_training(model, precision, updates, args):
    """Locks, loss, optimizer, schedule and average of a model that all ranks train together.

    Args:
        model: a models.Method on its device.
        precision: devices.Precision.
        updates: of an epoch.
        args: the flags.
    """

    def prepare(batch):  # on the device: augmented, normalised, and rounded as autocast would do
        steps = batch.pop("steps")
        return {
            v: model.normalize(x, steps.get(v)).to(precision.dtype) if v in IMAGE_VIEWS else x
            for v, x in batch.items()
        }

    warmup.check_flags(args, precision.device)
    layers.lock_towers(model, args)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    # Of a single micro-batch both gradients are the same, and the plain one is faster.
    exact = args.accum == "exact" and args.update_freq > 1
    with_grad = args.gather_with_grad or args.accum == "exact"
    reduce_dtype = torch.bfloat16 if args.bf16_gradients else None
    distributed.broadcast_model(model)
    groups = optimization.param_groups(model, args.wd, optimization.rate_scales(model, args))
    return engine.Training(
        model=model if exact else distributed.wrap_ddp(model, precision.device, reduce_dtype),
        criterion=losses.create_loss(
            model.loss, args.ssl_temp, args.ssl_scale, with_grad, args.clip_loss, args.duplicates
        ),
        optimizer=torch.optim.AdamW(groups, args.lr, args.betas, args.eps, fused=True),
        schedule=optimization.create_schedule(args, updates),
        precision=precision,
        update_freq=args.update_freq,
        skip_nonfinite=args.skip_nonfinite,
        exact=exact,
        reduce_dtype=reduce_dtype,
        clip_grad_norm=args.clip_grad_norm,
        prepare=prepare,
        after_update=getattr(model, "clamp_logit_scale", lambda: None),
        average=optimization.Average(model, args.ema_decay),
    )


def warm_up(model, training, log, args, augments_on_device=False):
    modules = [*model.blocks(), *training.criterion.blocks()]
    shape = args.batch_size, training.precision.device
    extra = contrast.extra_views(args.duplicates, *shape)
    batches = warmup.dummy_batches(model, *shape, extra)

    def prepare(views):  # as updates do, so that the trial covers the augmentation
        return training.prepare(warmup.as_loaded(views, augments_on_device))

    warmup.warm_up(training, modules, batches, log, args, prepare)


def main(args):
    device = distributed.init_distributed(args.device, args.dist_url, args.deterministic)
    utils.seed_everything(args.seed)

    if args.disable_amp and args.precision not in (None, "fp32"):
        raise InputError(f"--disable-amp contradicts --precision {args.precision}; give one")
    precision = devices.Precision("fp32" if args.disable_amp else args.precision, device)
    folder = output_folder(args)
    if args.evaluate:
        return evaluate_only(precision, folder, args)

    model, notes = create_model(args)
    model.to(device)
    validation = open_validation(model, args)
    loader = open_loader(model, device, args)
    updates = len(loader) // args.update_freq
    training = create_training(model, precision, updates, args)
    average, locked = training.average, layers.Locked(model)

    parts = initial.parts_of(model) | average.parts() | locked.parts()
    facts = {"preprocessing": model.preprocessing.to_dict(), "order": loader.order}
    with Run(folder, training, args, parts, **facts) as run:
        run.notes += notes
        run.resume(args.resume, check="--model, the locks and the rates", fixed=FIXED)
        average.start_if_absent(run)
        # The picture first: if --root is wrong it fails before anything is written.
        is_pictured = run.is_new and distributed.is_main_process()
        picture = picture_of_views(model, loader) if is_pictured else None
        run.start()
        advice.log_summary(run.log, model, validation, loader, training, args)
        warm_up(model, training, run.log, args, loader.augments_on_device)
        if is_pictured:
            run.log.picture("views", picture)

        evaluation = Evaluation(precision, args.batch_size, args.workers, run.poll)
        for epoch in run.epochs(args.epochs):
            # train, on all ranks, and log the means of the epoch
            means, speed = engine.train_one_epoch(
                training, loader, run, args.print_freq, args.max_bad_fraction
            )
            advice.advise(run.log, speed["data_wait"], loader)
            stats = {f"train_{key}": value for key, value in means.items()} | speed
            stats["lr"] = float(training.schedule[(epoch + 1) * updates - 1])
            if hasattr(model, "logit_scale"):
                stats["logit_scale"] = model.logit_scale.exp().item()
            if getattr(model, "logit_bias", None) is not None:
                stats["logit_bias"] = model.logit_bias.item()

            # validate; the first set chooses the best checkpoint
            distributed.broadcast_buffers(model)
            is_best = False
            if validation and ((epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs):
                is_best = validate(model, average.module, validation, evaluation, run, stats)

            run.end_epoch(stats, is_best)
        locked.check(run.log)


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
