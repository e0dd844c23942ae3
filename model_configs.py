"""Configurations of folders that hold a model, open_clip's and Hugging Face's.

Each reader takes the parsed file and its folder to (the model's name or None, fields of its
preprocessing). An entry by which the model would compute other embeddings than ours is an error.
"""

import os
from dataclasses import replace

from models import parse_name
from preprocessing import Preprocessing
from text_models import DESCRIPTION, TEXTS, TOKENIZER, open_text_model, read_small
from utils import InputError, read_json_object

# ---------------------------------------------------------------------------------------------
# open_clip


def read_open_clip(config, folder):
    """(name or None, fields of preprocessing) of an open_clip_config.json."""
    if "slip" in config:  # by export.py
        own = config["slip"]
        parse_name(own["model"])
        return own["model"], Preprocessing.from_dict(own["preprocessing"]).to_dict()
    model, images = config["model_cfg"], config.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    check_known(vision, text)
    if (mode := images.get("resize_mode", "shortest")) != "shortest":
        raise InputError(f"resize_mode {mode!r} is unknown; only 'shortest' is known here")
    form = {k: images[k] for k in ("mean", "std", "interpolation") if k in images}
    form["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if size := vision.get("image_size"):
        form["image_size"] = square(size)
    if not isinstance(name := vision.get("timm_model_name"), str | None):
        raise TypeError(f"timm_model_name {name!r}"[:80])
    return name, form


# Entries of open_clip's towers that shapes of the weights tell, or that bear on training alone.
FREE = {
    *("image_size", "layers", "width", "mlp_ratio", "patch_size", "patch_dropout", "output_tokens"),
    *("timm_model_name", "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    *("pos_embed_type", "attn_pooler_queries", "attn_pooler_heads", "context_length", "pad_id"),
    *("vocab_size", "eos_id", "hf_model_name", "hf_model_pretrained"),
}
HF_TEXT = {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
HEAD_WIDTHS = {1280: 80, 1408: 88}  # by the width of an image tower: of ViT-H and ViT-g; else 64


def check_known(vision, text):
    """Raises InputError for entries of a config by which embeddings would be others than ours.

    An entry that is off, as null or false, is no matter.
    """
    images = {"head_width": HEAD_WIDTHS.get(vision.get("width"), 64), "pool_type": "tok"}
    texts = {"heads": text.get("width", 512) // 64, "pool_type": "argmax", "proj_type": "linear"}
    if vision.get("timm_model_name"):
        images |= {"timm_pool": "", "timm_proj": "linear"}
        vision = {"timm_pool": "avg"} | vision  # open_clip's default, as the heads below
    vision = {"head_width": 64} | vision
    if name := text.get("hf_model_name"):  # entries of CLIP's text tower do not matter
        text = {key: value for key, value in (HF_TEXT | text).items() if key not in texts}
        texts = HF_TEXT | {"hf_tokenizer_name": name}
    else:
        text = {"heads": 8} | {key: value for key, value in text.items() if key not in HF_TEXT}
    for part, own in ((vision, images), (text, texts)):
        for key, value in part.items():
            if key not in FREE and value != own.get(key) and (value or key in own):
                known = f"; only {own[key]!r} is known here" if key in own else " is unknown here"
                raise InputError(f"its {key} {repr(value)[:80]}{known}")


TEXT_FOLDER = "text"  # of an export of ours: configuration and tokenizer of its text model


def text_name(config):
    """The name of the text model of Hugging Face that an open_clip_config.json gives, or None."""
    for key in ("model_cfg", "text_cfg", "hf_model_name"):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def text_files(config):
    """The files of a folder of weights that describe its text model, each a list of one."""
    is_ours = text_name(config) and "slip" in config
    return [[f"{TEXT_FOLDER}/{name}"] for name in DESCRIPTION] if is_ours else []


def read_text_model(config, folder):
    """The TextModel that an open_clip_config.json names, or None.

    Raises InputError if it is not one of open_clip's own and not beside the weights.
    """
    if not (name := text_name(config)):
        return None
    if text_files(config):
        found = open_text_model(os.path.join(folder, TEXT_FOLDER))
        return replace(found, name=str(config["slip"]["text_model"])[:200], weights=None)
    if name not in TEXTS:
        known = ", ".join(TEXTS)
        raise InputError(f"its text tower is {repr(name)[:80]}; only {known} are known here")
    path = os.path.join(folder, TOKENIZER)
    return replace(TEXTS[name], data=read_small(path) if os.path.isfile(path) else None)


def square(size):
    """The side in pixels, of itself or of equal [height, width]. Raises InputError for others."""
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise InputError(f"its image_size {repr(size)[:80]} is no square; only squares are known")
    return sides[0]


# ---------------------------------------------------------------------------------------------
# Hugging Face

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_huggingface(config, folder):
    """(None, fields of preprocessing) of the config.json of a CLIPModel."""
    if (kind := config.get("model_type")) != "clip":
        raise InputError(f"its model_type is {repr(kind)[:80]}; only 'clip' is known here")
    vision, text = config["vision_config"], config["text_config"]
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    if len(activations) > 1:
        raise InputError(f"its towers have activations {sorted(activations)}; only one is known")
    for part, own in ((vision, HEAD_WIDTHS.get(vision["hidden_size"], 64)), (text, 64)):
        width = part["hidden_size"] // part.get("num_attention_heads", part["hidden_size"] // own)
        if width != own:
            raise InputError(f"its heads have width {width}; only {own} is known here")
    form = {"activation": activations.pop(), "image_size": vision.get("image_size")}
    path = os.path.join(folder, "preprocessor_config.json")
    if os.path.exists(path):
        images = read_json_object(path, "configuration")
        form |= {k: images[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in images}
        if "resample" in images:
            number = images["resample"]
            form["interpolation"] = RESAMPLE.get(number, f"number {number}")
    return None, form
