"""State dicts of open_clip, OpenAI, Hugging Face and bare image towers, to ours and back.

Functions of dicts of tensors; nothing of these projects is imported. A layout is a table
{their name: ours}: `*` stands for a number, `**` for any text, and endings as ".weight" stay.
Shapes: W width of a tower, D joint embedding, T positions of a tower.
"""

import math
import re

import torch

from infra.checkpoint import describe_mismatches, mismatches
from models import CLIP
from text_models import with_text
from towers import CLIP_TOWERS, HF_TOWERS
from utils import InputError

# ---------------------------------------------------------------------------------------------
# Tables

OPEN_CLIP_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP_TEXT = {
    key: key
    for key in (
        "token_embedding",
        "positional_embedding",
        *(f"transformer.resblocks.*.{part}" for part in OPEN_CLIP_BLOCK),
        "ln_final",
        "text_projection",
        "logit_scale",
        "logit_bias",  # of the sigmoid loss
    )
} | {"text.**": "text.**"}  # the latter of Hugging Face's text towers
OPEN_CLIP_VIT = OPEN_CLIP_TEXT | {
    "visual.class_embedding": "visual.cls_token",
    "visual.positional_embedding": "visual.pos_embed",
    "visual.conv1": "visual.patch_embed.proj",
    "visual.ln_pre": "visual.norm_pre",
    "visual.ln_post": "visual.norm",
    "visual.proj": "image_projection",
    **{
        f"visual.transformer.resblocks.*.{theirs}": f"visual.blocks.*.{ours}"
        for theirs, ours in OPEN_CLIP_BLOCK.items()
    },
}
RESNET_BLOCK = {
    "conv1": "conv1_1x1.conv",
    "bn1": "conv1_1x1.bn",
    "conv2": "conv2_kxk.conv",
    "bn2": "conv2_kxk.bn",
    "conv3": "conv3_1x1.conv",
    "bn3": "conv3_1x1.bn",
    "downsample.0": "shortcut.conv.conv",
    "downsample.1": "shortcut.conv.bn",
}
OPEN_CLIP_RESNET = OPEN_CLIP_TEXT | {
    "visual.attnpool.positional_embedding": "visual.head.pos_embed",
    **{f"visual.attnpool.{name}_proj": f"visual.head.{name}" for name in "qkv"},
    "visual.attnpool.c_proj.weight": "image_projection",
    "visual.attnpool.c_proj.bias": "image_projection_bias",
    **{f"visual.conv{i}": f"visual.stem.conv{i}.conv" for i in (1, 2, 3)},
    **{f"visual.bn{i}": f"visual.stem.conv{i}.bn" for i in (1, 2, 3)},
    **{
        f"visual.layer{stage + 1}.*.{theirs}": f"visual.stages.{stage}.*.{ours}"
        for stage in range(4)
        for theirs, ours in RESNET_BLOCK.items()
    },
}
OPEN_CLIP_TIMM = OPEN_CLIP_TEXT | {
    "visual.trunk.**": "visual.**",
    "visual.head.proj.weight": "image_projection",
    "visual.head.proj.bias": "image_projection_bias",
}

# Hugging Face holds query, key and value apart: qkv_proj stands for q_proj, k_proj and v_proj.
HUGGINGFACE_BLOCK = {  # theirs: (our image tower's, our text tower's)
    "self_attn.qkv_proj.weight": ("attn.qkv.weight", "attn.in_proj_weight"),
    "self_attn.qkv_proj.bias": ("attn.qkv.bias", "attn.in_proj_bias"),
    "self_attn.out_proj": ("attn.proj", "attn.out_proj"),
    "layer_norm1": ("norm1", "ln_1"),
    "layer_norm2": ("norm2", "ln_2"),
    "mlp.fc1": ("mlp.fc1", "mlp.c_fc"),
    "mlp.fc2": ("mlp.fc2", "mlp.c_proj"),
}
HUGGINGFACE = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "image_projection",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.cls_token",
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual.patch_embed.proj",
    "vision_model.pre_layrnorm": "visual.norm_pre",  # sic
    "vision_model.post_layernorm": "visual.norm",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    **{
        f"{tower}_model.encoder.layers.*.{theirs}": f"{blocks}.*.{ours[i]}"
        for i, (tower, blocks) in enumerate(
            {"vision": "visual.blocks", "text": "transformer.resblocks"}.items()
        )
        for theirs, ours in HUGGINGFACE_BLOCK.items()
    },
}

# By their names: transposed in ours, and with so many more axes of size 1 before theirs.
TRANSPOSED = {
    "visual.attnpool.c_proj.weight",
    "visual.head.proj.weight",
    "visual_projection.weight",
    "text_projection.weight",
}
MORE_AXES = {
    "visual.class_embedding": 2,
    "visual.positional_embedding": 1,
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding.weight": 1,
}
SURPLUS = re.compile(  # constants of their models, no weights
    r"(text\.)?attn_mask|input_resolution|context_length|vocab_size|"
    r"text\.transformer\.embeddings\.position_ids|"
    r"(text|vision)_model\.embeddings\.position_ids"
)
POSITIONS = {"positional_embedding": 0, "visual.pos_embed": 1, "visual.head.pos_embed": 0}  # T


# ---------------------------------------------------------------------------------------------
# Renaming


def rename(keys, names):
    """{key: its name by a table of patterns}. Raises InputError naming keys that it lacks."""

    def pattern(name):
        text = re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)")
        return re.compile(text + r"((?:\.\w+)?)")

    rules = [
        (pattern(old), new.replace("**", "*").replace("*", "{}") + "{}")
        for old, new in names.items()
    ]
    found = {}
    for key in keys:
        matches = ((rule.fullmatch(key), new) for rule, new in rules)
        name = next((new.format(*match.groups()) for match, new in matches if match), None)
        found[key] = name
    if unknown := [key for key, name in found.items() if name is None]:
        first = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        raise InputError(f"weights of an unknown layout: {len(unknown)} keys unknown: {first}")
    return found


def to_ours(tensors, names):
    """Renames by a table {theirs: ours}, and gives each tensor our shape."""
    result = {}
    for key, name in rename(tensors, names).items():
        value = tensors[key]
        if key in TRANSPOSED and value.ndim == 2:
            value = value.T.contiguous()
        result[name] = value[(None,) * MORE_AXES.get(key, 0)]
    return result


def to_theirs(state_dict, names):
    """The inverse of `to_ours`, by the same table."""
    result = {}
    for key, name in rename(state_dict, {ours: theirs for theirs, ours in names.items()}).items():
        value = state_dict[key][(0,) * MORE_AXES.get(name, 0)]
        result[name] = value.T.contiguous() if name in TRANSPOSED else value
    return result


# ---------------------------------------------------------------------------------------------
# open_clip and OpenAI


def has_hf_text(tensors):
    """Whether the text tower of a state dict, ours or open_clip's, is Hugging Face's."""
    return any(key.startswith("text.proj.") for key in tensors)


def from_open_clip(tensors):
    """The state dict of our CLIP, from open_clip's or OpenAI's.

    The image tower is a ViT, a modified ResNet or one of timm's (visual.trunk); the keys of CLIP's
    text tower are flat or below "text.". Raises InputError for another layout.
    """
    flat = "" if has_hf_text(tensors) else "text."
    tensors = {
        key.removeprefix(flat): value
        for key, value in tensors.items()
        if not SURPLUS.fullmatch(key)
    }
    if any(key.startswith("visual.trunk.") for key in tensors):
        return to_ours(tensors, OPEN_CLIP_TIMM)
    is_resnet = any(key.startswith("visual.attnpool.") for key in tensors)
    return to_ours(tensors, OPEN_CLIP_RESNET if is_resnet else OPEN_CLIP_VIT)


def to_open_clip(state_dict, is_native):
    """The inverse of `from_open_clip`; entries of the SimCLR head are left out.

    Args:
        state_dict: of a CLIP or SLIP model of ours.
        is_native: whether open_clip's own ViT or ResNet is to load it (rows of CLIP_TOWERS), not
            timm's tower (all others).
    """
    weights = {k: v for k, v in state_dict.items() if not k.startswith("image_mlp.")}
    if not is_native:
        return to_theirs(weights, OPEN_CLIP_TIMM)
    is_resnet = any(key.startswith("visual.stem.") for key in weights)
    return to_theirs(weights, OPEN_CLIP_RESNET if is_resnet else OPEN_CLIP_VIT)


# ---------------------------------------------------------------------------------------------
# Hugging Face


def from_huggingface(tensors):
    """The state dict of our CLIP, from that of transformers.CLIPModel.

    Raises InputError for another layout.
    """
    joined = {}
    for key, value in tensors.items():
        if SURPLUS.fullmatch(key):
            continue
        kind = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", key)
        if kind == key:
            joined[key] = value
        elif kind not in joined:
            parts = [tensors.get(kind.replace("qkv_proj", f"{name}_proj")) for name in "qkv"]
            if len({getattr(part, "shape", None) for part in parts}) > 1:  # or one is absent
                raise InputError(f"weights of an unknown layout: parts of {kind} differ in shape")
            joined[kind] = torch.cat(parts)
    return to_ours(joined, HUGGINGFACE)


def without_extras(state_dict):
    """The entries of a CLIP that every training has: no SimCLR head, no bias of a sigmoid loss."""
    return {
        key: value
        for key, value in state_dict.items()
        if not key.startswith("image_mlp.") and key != "logit_bias"
    }


def to_huggingface(state_dict):
    """The inverse of `from_huggingface`: our CLIP with a ViT of CLIP_TOWERS."""
    result = {}
    for key, value in to_theirs(without_extras(state_dict), HUGGINGFACE).items():
        is_joined = ".qkv_proj." in key
        parts = zip("qkv", value.chunk(3), strict=True) if is_joined else [("qkv", value)]
        result |= {key.replace("qkv_proj", f"{name}_proj"): part for name, part in parts}
    return result


# ---------------------------------------------------------------------------------------------
# Finding the model

LAYOUTS = {  # an entry that tells a layout of image-text models: its function
    "image_projection": dict,  # ours, as it is
    "visual.proj": from_open_clip,
    "visual.attnpool.c_proj.weight": from_open_clip,
    "visual.head.proj.weight": from_open_clip,
    "visual_projection.weight": from_huggingface,
}


def to_ours_if_pair(tensors):
    """The state dict of our CLIP if the tensors are of an image-text model, else None."""
    return next((read(tensors) for key, read in LAYOUTS.items() if key in tensors), None)


def native_size(state_dict):
    """The image size in pixels that the positions of an image tower are for; None: unknown."""
    if (positions := state_dict.get("visual.head.pos_embed")) is not None:
        return 32 * math.isqrt(len(positions))  # a ResNet has a position for 32 pixels
    patch, positions = map(state_dict.get, ("visual.patch_embed.proj.weight", "visual.pos_embed"))
    if patch is None or positions is None or positions.ndim != 3:
        return None
    return patch.shape[-1] * math.isqrt(positions.shape[1])


def candidates(tensors, text_model):
    """{name: row} of the rows whose CLIP a state dict in our layout may fit.

    text_model: the TextModel beside the weights, which takes the place of the rows' own.
    """
    shapes = {key: value.shape for key, value in tensors.items()}
    layers = len({key.split(".")[2] for key in shapes if key.startswith("transformer.resblocks.")})
    rows, is_flat = CLIP_TOWERS, not has_hf_text(tensors)
    if not is_flat:
        rows = CLIP_TOWERS if text_model else HF_TOWERS
        rows = {k: with_text(r, text_model or r.text_model) for k, r in rows.items()}
    alike = {
        name: row
        for name, row in rows.items()
        if shapes.get("image_projection", (0,))[-1:] == (row.embed_dim,)
        and ("image_projection_bias" in shapes) == row.projection_bias
        and (not is_flat or shapes.get("text_projection") == (row.text_width, row.embed_dim))
        and (not is_flat or layers == row.text_layers)
    }
    return alike or rows


def match_tower(tensors, text_model=None):
    """The name of the row whose CLIP a state dict in our layout fits.

    Numbers of positions may differ; a row with equal ones comes first.

    Raises InputError naming the first keys that fit none.
    """
    tensors = without_extras(tensors)
    fits = []
    for name, row in candidates(tensors, text_model).items():
        with torch.device("meta"):
            own = CLIP(row).state_dict()
        faults, resized = misfits(own, tensors)
        fits.append((sum(map(len, faults.values())), len(resized), name, faults))
        if not faults and not resized:
            return name
    *_, name, faults = min(fits, key=lambda fit: fit[:2])
    if text := describe_mismatches(faults):
        raise InputError(f"weights fit no tower; the nearest is {name} ({text})")
    return name


def misfits(own, tensors):
    """(mismatches of state dicts, {keys that differ in their number of positions alone})."""
    resized = {k for k, axis in POSITIONS.items() if differs_at(own, tensors, k, axis)}
    alike = {key: tensors[key] if key in resized else value for key, value in own.items()}
    return mismatches(alike, tensors), resized


def differs_at(own, tensors, key, axis):
    """Whether a tensor differs from our own in the size of one axis alone."""
    mine, theirs = (list(getattr(d.get(key), "shape", ())) for d in (own, tensors))
    if mine == theirs or len(mine) != len(theirs):
        return False
    mine[axis] = theirs[axis]
    return mine == theirs
