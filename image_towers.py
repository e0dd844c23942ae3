"""Image towers from checkpoints of any kind: prefixes, heads, and position embeddings.

Shapes: W width of a tower, T positions.
"""

import math
import re
from collections import Counter

import timm

from infra.checkpoint import describe_mismatches, mismatches
from utils import InputError


def image_tower(tensors, visual):
    """The weights of a timm model from a checkpoint that holds an image tower alone.

    Keys may have a prefix, as those of MoCo v3, DINO and Lightning: the one below which most of
    visual's keys lie. Heads are left out; positions are resampled.

    Returns (weights, [a note on the prefix, and one on entries left out]).

    Raises InputError naming keys that are missing, unknown or of other shape.
    """
    own, prefix = visual.state_dict(), find_prefix(tensors, visual)
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    weights = resample_positions(weights, visual, prefix="")
    surplus = [key for key in weights if key not in own and is_head(key, visual)]
    weights = {key: value for key, value in weights.items() if key not in surplus}
    if text := describe_mismatches(mismatches(own, weights)):
        raise InputError(f"weights are of another image tower ({text}); choose its architecture")
    notes = [f"the image tower is read from {prefix}*"] if prefix else []
    if surplus:
        first = ", ".join(surplus[:3]) + ", ..." * (len(surplus) > 3)
        notes.append(f"{len(surplus)} entries are left out: {first}")
    return weights, notes


def find_prefix(tensors, visual):
    """The prefix of the keys of visual; of equal ones, that of the weights that are published."""
    own, found = visual.state_dict(), Counter()
    for key, value in tensors.items():
        parts = key.split(".")
        for i in range(len(parts)):
            rest = ".".join(parts[i:])
            if rest in own and own[rest].shape == value.shape:
                found[key.removesuffix(rest)] += 1
    return max(found, key=lambda p: (found[p], bool(PUBLISHED.search(p))), default="")


# Of MoCo v3's two towers, and of DINO's and iBOT's, these are the ones to evaluate.
PUBLISHED = re.compile(r"(^|\.)(base_encoder|teacher)\.")


def is_head(key, visual):
    """Whether an entry is of a classifier or projector, no part of an image tower."""
    classifiers = visual.pretrained_cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    is_classifier = any(f"{key}.".startswith(f"{name}.") for name in names)
    return is_classifier or not hasattr(visual, key.split(".")[0])


def resample_positions(state_dict, visual, prefix="visual.", antialias=True):
    """A state dict with position embeddings of visual's image size, interpolated bicubically.

    The class token's embedding stays; so do embeddings that fit, or are on no square grid.

    Args:
        state_dict: of a model (prefix "visual.") or of an image tower (prefix "").
        visual: a ViT of timm's, (1, T, W), or one of its CLIP ResNets, (T, W).
        antialias: as open_clip, or not, as BeiT: another kernel, when enlarging too.
    """
    grid = getattr(getattr(visual, "patch_embed", None), "grid_size", None)
    key, prefixes = "pos_embed", getattr(visual, "num_prefix_tokens", 0)
    if getattr(visual, "no_embed_class", False):
        prefixes = 0
    if grid is None:
        grid = getattr(getattr(visual, "head", None), "feat_size", None)
        key, prefixes = "head.pos_embed", 1
    old = state_dict.get(prefix + key)
    if grid is None or old is None or old.ndim not in (2, 3):
        return state_dict
    side = math.isqrt(max(old.shape[-2] - prefixes, 0))
    if side == 0 or side**2 + prefixes != old.shape[-2]:
        return state_dict
    new = old if old.ndim == 3 else old[None]
    new = timm.layers.resample_abs_pos_embed(
        new, grid, num_prefix_tokens=prefixes, antialias=antialias
    )
    return state_dict | {prefix + key: new if old.ndim == 3 else new[0]}
