"""The layers of a model's towers as data, and locks: parts of a model that do not train.

A layer is a list of dotted names; each stands for a parameter, or for all parameters below it.
"""

import hashlib
from dataclasses import dataclass

import timm
import torch
from torch import nn

from utils import InputError, natural


def add_lock_flags(add):
    """Adds the flags of locks, with add_argument of their group."""
    add("--lock-image", action="store_true", help="image tower and its projection do not train")
    text = "groups of a locked image tower left to train, from the end: 1 the projection, 2 also "
    text += "the last block with the norm, then block by block; the patch embedding stays locked"
    add("--lock-image-unlocked-groups", default=0, type=natural, metavar="N", help=text)
    add("--lock-text", action="store_true", help="text tower does not train; its projection does")
    text = "blocks of a locked text tower left to train, from the end: 1 the last one with the "
    text += "norm, then block by block; the embeddings stay locked"
    add("--lock-text-unlocked-layers", default=0, type=natural, metavar="N", help=text)


# ---------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True)
class Layers:
    """The layers of a tower, from its input up.

    stem: patches or tokens, positions, class token. blocks: a list of layers. last: final norm,
    pooling. projection: into the joint embedding, [] if there is none. locks_projection: whether a
    lock takes the projection as well; otherwise it always trains.
    """

    stem: list
    blocks: list
    last: list
    projection: list
    locks_projection: bool

    def groups(self):
        """The groups that locks count, as open_clip has them."""
        *blocks, top = self.blocks
        projection = [self.projection] if self.projection and self.locks_projection else []
        return [self.stem, *blocks, top + self.last, *projection]

    def depths(self):
        """The layers from each of which to the one below the learning rate falls."""
        return [self.stem, *self.blocks, self.last + self.projection]


def image_layers(visual, prefix="", projection=()):
    """The Layers of a timm tower: blocks of a ViT, otherwise the layers that timm's groups tell.

    Args:
        visual: the tower.
        prefix: of its names in the model, as "visual.".
        projection: names in the model.
    """
    names = [name for name, _ in visual.named_parameters()]
    parts = [*getattr(visual, "blocks", ())]
    if parts and not any(isinstance(part, nn.Sequential) for part in parts):
        first = next(i for i, name in enumerate(names) if name.startswith("blocks."))
        stem, blocks = names[:first], [[f"blocks.{i}"] for i in range(len(parts))]
        last = [name for name in names[first:] if not name.startswith("blocks.")]
    else:
        stem, blocks, last = grouped_by_timm(visual, names)
    stem, *blocks, last = ([prefix + name for name in layer] for layer in (stem, *blocks, last))
    return Layers(stem, blocks, last, list(projection), locks_projection=True)


def grouped_by_timm(visual, names):
    """(stem, blocks, last); timm puts the parts behind the last block into its group."""
    if not hasattr(visual, "group_matcher"):
        return [], [names], []
    groups = timm.models.group_parameters(visual, visual.group_matcher(coarse=False))
    stem, *blocks = (groups[number] for number in sorted(groups))
    if len(blocks) < 2:
        return [], [names], []
    *below, top = blocks
    modules = {name.partition(".")[0] for block in below for name in block}
    last = [name for name in top if name.partition(".")[0] not in modules]
    top = [name for name in top if name not in last]
    return stem, [*below, top] if top else below, last


def layers_of(model):
    """{"image": Layers, "text": Layers if the model reads text} of a models.Method."""
    projection = [n for n, _ in model.named_parameters() if n.startswith("image_projection")]
    towers = {"image": image_layers(model.visual, "visual.", projection)}
    return towers | ({"text": model.text_tower.text_layers()} if "text" in model.views else {})


def places(model, layers):
    """{name of a parameter: the number of its layer}; parameters of no layer are not in it."""
    prefixes = {name: i for i, layer in enumerate(layers) for name in layer}
    found = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        above = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        if (prefix := next((p for p in above if p in prefixes), None)) is not None:
            found[name] = prefixes[prefix]
    return found


# ---------------------------------------------------------------------------------------------
# Locks


class Lockable:
    """A base class of modules: locked parts have no gradient and stay in evaluation mode."""

    locked = ()  # modules, all of whose parameters are locked
    locked_views = frozenset()  # of towers that train nothing below the projection

    def lock(self, names, views):
        """Locks the parameters of these names, from now on.

        Views are those whose features then depend on no parameter that trains.
        """
        params = dict(self.named_parameters())
        for name in names:
            params[name].requires_grad_(False)
        self.locked_views |= frozenset(views)
        self.locked = [m for m in self.modules() if is_locked(m)]
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self.locked:
            module.eval()  # also batch norm and dropout
        return self


def is_locked(module):
    params = [*module.parameters()]
    return bool(params) and not any(param.requires_grad for param in params)


def lock_towers(model, args):
    """Locks a models.Method by the flags of add_lock_flags.

    Raises InputError if they fit neither each other nor the model.
    """
    numbers = {
        "image": (args.lock_image, args.lock_image_unlocked_groups),
        "text": (args.lock_text, args.lock_text_unlocked_layers),
    }
    for tower, (is_asked, number) in numbers.items():
        if number and not is_asked:
            raise InputError(f"{number} unlocked groups of the {tower} tower: lock it as well")
        if is_asked:
            lock_tower(model, tower, number)
    if args.patch_dropout and "image" in model.locked_views:
        raise InputError("patch dropout: a locked image tower sees all patches; omit it")


def lock_tower(model, tower, number):
    """Locks one tower but for its last groups, so many."""
    if (found := layers_of(model).get(tower)) is None:
        raise InputError(f"lock of the {tower} tower: the model has none; omit it")
    groups = found.groups()
    if number >= len(groups):
        raise InputError(
            f"{number} unlocked groups of the {tower} tower: it has {len(groups)}; leave "
            f"{len(groups) - 1} at most, or do not lock it"
        )
    locked = places(model, groups[: len(groups) - number])
    below = places(model, [found.stem, *found.blocks, found.last])
    views = [view for view in model.views if (view == "text") == (tower == "text")]
    model.lock(locked, views if below.keys() <= locked.keys() else [])


# ---------------------------------------------------------------------------------------------
# The proof that they hold


def digests(state_dict):
    """{key: a digest of the tensor}."""
    return {
        key: hashlib.sha256(value.cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for key, value in state_dict.items()
    }


def changed(before, after):
    """The keys whose digests differ."""
    return [key for key in before if after.get(key) != before[key]]


class Locked:
    """A part of a run: the digests of a model's locked parts as the run began with them.

    Of parameters and, in locked modules, buffers. The checkpoint keeps them for a run that resumes.
    """

    def __init__(self, model):
        self.model, self.first = model, {}
        self.first = self.measure()

    def measure(self):
        state, modules = self.model.state_dict(keep_vars=True), set(self.model.locked)
        held = {id(b) for module in modules for b in module.buffers()}
        held |= {id(p) for p in self.model.parameters() if not p.requires_grad}
        return digests({key: x.detach() for key, x in state.items() if id(x) in held})

    def parts(self):
        """{key of the checkpoint: self}, {} if nothing is locked."""
        return {"locked": self} if self.first else {}

    def state_dict(self):
        return {"digests": self.first}

    def load_state_dict(self, state):
        """After the model's. Raises InputError if its locked parts are not as the run began."""
        if keys := changed(state["digests"], self.measure()):
            raise InputError(
                f"the checkpoint's {keys[0]} is locked, but not as it was when its run began; "
                "resume from another one"
            )
        self.first = state["digests"]

    def check(self, log):
        """At the end of a run. Raises RuntimeError if a locked part was changed."""
        if keys := changed(self.first, self.measure()):
            raise RuntimeError(f"{keys[0]} is locked, but was changed")
        if self.first:
            log.info(f"{len(self.first)} locked tensors are as they were when the run began")
