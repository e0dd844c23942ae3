"""How weights are updated: rates by part, groups of parameters, schedules, averaged weights."""

from dataclasses import dataclass

import numpy as np
import timm.utils

from layers import image_layers, layers_of, places
from utils import InputError, natural, not_negative, number, positive, positive_int


def add_optimization_flags(parser):
    """Adds the flags of the optimizer and its schedule; returns add_argument of their group."""
    group = parser.add_argument_group("Optimization")
    add = group.add_argument
    add("--epochs", default=25, type=positive_int)
    add = group.add_mutually_exclusive_group().add_argument
    # As text, so that argparse can tell the default from the same number given.
    add("--warmup-epochs", default="1", type=natural, help="epochs of linear warm-up")
    add("--warmup-steps", type=natural, help="updates of warm-up, instead")
    add = group.add_argument
    add(
        "--schedule", default="cosine", choices=SCHEDULES, help="of the learning rate after warm-up"
    )
    text = "epochs at the end of constant-cooldown in which the rate falls linearly"
    add("--cooldown-epochs", type=positive_int, help=text)
    add("--lr", default=3e-3, type=positive, help="peak learning rate")
    add("--lr-image", type=positive, help="peak of image tower and projection; by default --lr")
    add("--lr-text", type=positive, help="peak of text tower and projection; by default --lr")
    text = "factor of the rate from each block to the one below, in both towers; 1: none"
    add("--layer-decay", default=1.0, type=positive, help=text)
    add("--lr-start", default=1e-6, type=not_negative, help="learning rate at the start of warm-up")
    text = "learning rate at the end of the cosine or cool-down"
    add("--lr-end", default=1e-5, type=not_negative, help=text)
    add("--wd", default=0.1, type=not_negative, help="weight decay, not of biases and norms")
    add("--betas", default=(0.9, 0.98), nargs=2, type=number(float, 0, 1), help="AdamW's")
    add("--eps", default=1e-8, type=not_negative, help="AdamW's")
    text = "also keep and validate an average of the weights, with this decay per update"
    add("--ema-decay", type=number(float, 0, 1), metavar="D", help=text)
    return add


# ---------------------------------------------------------------------------------------------
# Groups of parameters


def param_groups(model, weight_decay, scales=None):
    """Weight decay for tensors of two or more dimensions; none for biases, norms, logit_scale.

    The order (decayed first) is the archived code's, so that its optimizer states load.

    Args:
        model: its parameters that require a gradient are taken.
        weight_decay: of those that decay.
        scales: {name of a parameter: factor of the learning rate}, 1 for all others. With more than
            one factor there is a group for each, which names it "lr_scale".
    """
    scales, groups = scales or {}, {}
    for is_decayed in (True, False):  # both are there, if only as empty groups
        for name, param in model.named_parameters():
            if param.requires_grad and (param.ndim >= 2) == is_decayed:
                key = is_decayed, scales.get(name, 1.0)
                groups.setdefault(key, []).append(param)
    if {scale for _, scale in groups} <= {1.0}:
        return [
            {"params": groups.get((True, 1.0), []), "weight_decay": weight_decay},
            {"params": groups.get((False, 1.0), []), "weight_decay": 0.0},
        ]
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (decays, scale), params in groups.items()
    ]


def rate_scales(model, args):
    """{name of a parameter: factor of its learning rate}, by the flags; {} by default.

    Args:
        model: a models.Method; what is no part of a tower, as logit_scale, has the factor 1.
        args: the flags.

    Raises InputError for a rate of a tower that is not there or does not train.
    """
    rates, params = {"image": args.lr_image, "text": args.lr_text}, dict(model.named_parameters())
    if not any(rates.values()) and args.layer_decay == 1:
        return {}
    towers, scales = layers_of(model), {}
    for tower, rate in rates.items():
        layers = towers[tower].depths() if tower in towers else []
        found = places(model, layers)
        if rate and not any(params[name].requires_grad for name in found):
            reason = "locked" if found else "not there"
            raise InputError(
                f"learning rate {rate:g} of the {tower} tower, which is {reason}; omit it"
            )
        whole = rate / args.lr if rate else 1.0
        decay, top = args.layer_decay, len(layers) - 1
        scales |= {name: whole * decay ** (top - layer) for name, layer in found.items()}
    return scales


def layer_groups(vit, weight_decay, layer_decay):
    """The groups for fine-tuning: a layer each, with its factor of the learning rate, "lr_scale".

    No weight decay of biases, norms, class token and positions.
    """
    layers, groups = image_layers(vit).depths(), {}
    layer_of = places(vit, layers)
    for name, param in vit.named_parameters():
        layer = layer_of[name]
        is_plain = param.ndim < 2 or name in vit.no_weight_decay()
        group = {"lr_scale": layer_decay ** (len(layers) - 1 - layer), "params": []}
        group["weight_decay"] = 0.0 if is_plain else weight_decay
        groups.setdefault((layer, is_plain), group)["params"].append(param)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------
# Schedules


def cosine(peak, end, steps, cooldown=0):
    """Half a cosine, which would reach `end` one update after the last."""
    phase = np.pi * np.arange(steps) / max(steps, 1)
    return end + 0.5 * (peak - end) * (1 + np.cos(phase))


def constant(peak, end, steps, cooldown=0):
    return np.full(steps, peak)


def constant_cooldown(peak, end, steps, cooldown):
    """The last `cooldown` updates fall linearly; they would reach `end` one update later."""
    left = 1 - np.arange(cooldown) / cooldown
    return np.concatenate([np.full(steps - cooldown, peak), end + (peak - end) * left])


@dataclass(frozen=True)
class Schedule:
    """rates: function of the peak, the end, the updates after warm-up, those of the cool-down."""

    rates: callable
    cools_down: bool = False


SCHEDULES = {
    "cosine": Schedule(cosine),
    "constant": Schedule(constant),
    "constant-cooldown": Schedule(constant_cooldown, cools_down=True),
}


def cosine_scheduler(
    base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0.0
):
    """One value per update, (epochs * niter_per_ep,): linear warm-up, then half a cosine.

    Warm-up ends on base_value at its last update; the cosine starts there and would reach
    final_value one update after the last. Raises InputError if warm-up outlasts training.
    """
    check_warmup(warmup_epochs, epochs, "epochs")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    steps = (epochs - warmup_epochs) * niter_per_ep
    return np.concatenate([warmup, cosine(base_value, final_value, steps)])


def check_warmup(length, whole, unit):
    if length > whole:
        raise InputError(f"warm-up of {length} {unit} exceeds training of {whole}; lower it")


def create_schedule(args, updates):
    """The learning rate of each update of the run, by the flags; updates: of an epoch.

    Raises InputError if they do not fit each other.
    """
    row, cooldown = SCHEDULES[args.schedule], args.cooldown_epochs or 0
    if cooldown and not row.cools_down:
        raise InputError(
            f"schedule {args.schedule} has no cool-down; choose constant-cooldown, or omit its "
            f"{cooldown} epochs"
        )
    if row.cools_down and not cooldown:
        raise InputError(f"schedule {args.schedule}: say how many epochs the cool-down takes")
    steps, unit, given = args.epochs * updates, "epochs", args.warmup_epochs
    warmup = given * updates
    if args.warmup_steps is not None:
        warmup, unit, given = args.warmup_steps, "updates", args.warmup_steps
    check_warmup(given, args.epochs if unit == "epochs" else steps, unit)
    if warmup + cooldown * updates > steps:
        raise InputError(
            f"warm-up of {given} {unit} and cool-down of {cooldown} epochs exceed training of "
            f"{args.epochs} epochs; lower one of them"
        )
    ramp = np.linspace(args.lr_start, args.lr, warmup)
    rates = row.rates(args.lr, args.lr_end, steps - warmup, cooldown * updates)
    return np.concatenate([ramp, rates])


# ---------------------------------------------------------------------------------------------
# Averaged weights


class Average:
    """The moving average of a model's weights, by timm; of none if decay is None.

    Buffers that are numbers (batch statistics) are averaged alike, counts are copied.
    """

    def __init__(self, model, decay):
        self.model = model
        self.ema = None if decay is None else timm.utils.ModelEmaV3(model, decay)

    def __bool__(self):
        return self.ema is not None

    @property
    def module(self):
        """The model with the averaged weights, in evaluation mode; None if there is none."""
        return self.ema.module if self else None

    def update(self):
        """After an update of the model; on its device, which nothing waits for."""
        self.ema.update(self.model)

    def parts(self):
        """{key of the checkpoint: module}, {} if there is none."""
        return {"ema": self.module} if self else {}

    def start_if_absent(self, run):
        """An average that the resumed checkpoint lacks starts from the checkpoint's weights."""
        if "ema" in run.checkpoints.absent:
            self.ema.set(self.model)
            note = "the checkpoint holds no average of weights: it starts from its weights"
            run.notes.append(note)
