"""The lines of a training's log that tell of its settings, and of their pitfalls."""

import towers
from infra import distributed

MIN_SSL_BATCH = 64  # samples per step below which the SimCLR head's batch statistics mislead


def log_summary(log, model, validation, loader, training, args):
    """The first lines of a run's log."""
    precision, k = training.precision, args.update_freq
    batch = args.batch_size * distributed.get_world_size()
    log.info(
        f"{args.model}: {loader.images} images, {len(loader) // k} updates "
        f"an epoch of {batch} x {k}, {precision.name} on {precision.device.type}"
    )
    log_parts(log, model, training, args)
    locked = model.locked_views
    if k > 1 and not training.exact:
        log.info(
            f"note: negatives and batch statistics are those of micro-batches of {batch}; "
            f"--accum exact takes them from all {batch * k} samples of an update"
        )
    if training.exact and towers.has_batch_norm(model.visual) and "image" not in locked:
        log.info(
            f"note: the batch norm inside of {args.model}'s image tower sees {args.batch_size} "
            "samples at a time, so --accum exact is not exact there; all else is"
        )
    contrasted = batch * k if training.exact else batch
    if "aug1" in model.views and contrasted < MIN_SSL_BATCH:
        log.info(
            f"warning: {contrasted} samples over all ranks are few for the batch statistics "
            f"of the SimCLR head; use {MIN_SSL_BATCH} or more"
        )
    if not validation.tasks:
        log.info("no zero-shot validation: --val-dataset none, or a method without text")


def log_parts(log, model, training, args):
    """The parts of the model that do not train, or at rates of their own."""
    sizes = {p: p.numel() for p in model.parameters()}
    if locked := sum(size for p, size in sizes.items() if not p.requires_grad):
        log.info(f"locked: {locked:,} of {sum(sizes.values()):,} parameters")
        if not args.init_from:
            log.info("warning: they are random numbers: --init-from gives weights to lock")
    if "aug1" in model.locked_views:
        log.info("note: of a locked image tower the SimCLR loss trains its own head alone")
    scales = [group.get("lr_scale", 1.0) for group in training.optimizer.param_groups]
    if set(scales) != {1.0}:
        low, high = args.lr * min(scales), args.lr * max(scales)
        log.info(f"peak learning rates of {len(scales)} groups: {low:.3g} to {high:.3g}")


def advise(log, data_wait, loader):
    """One line, once a run, if training waits for its data."""
    if data_wait > 0.1:
        augment = "" if loader.augments_on_device else "--augment device, "
        log.info_once(
            f"over 10% of the time is spent waiting for data ({data_wait:.0%} in the epoch): try "
            f"--workers above {loader.workers}, {augment}smaller images or faster storage",
            topic="data wait",
        )
