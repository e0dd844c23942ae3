"""A model's files for open_clip, timm and Hugging Face's transformers.

Each writer takes a Source, the folder to write, and `home`, the path that the folder will have; it
returns notes for the folder's README. None of these tools but timm is imported.
"""

import math
from dataclasses import dataclass

import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

import layouts
import utils
from infra.checkpoint import describe_mismatches, mismatches
from model_configs import TEXT_FOLDER
from models import CLIP
from tokenizer import END, START
from towers import ACTIVATIONS, Tower, output_width
from utils import InputError
from weight_names import tower_of


@dataclass(frozen=True)
class Source:
    """A model in eval mode, its name, METHOD_TOWER or a tower's, and its row of towers."""

    model: nn.Module
    name: str
    tower: Tower

    @property
    def form(self):
        return self.model.preprocessing


def save_tensors(path, tensors):
    """Each with memory of its own, as safetensors wants it."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    storages = {value.untyped_storage().data_ptr() for value in tensors.values()}
    if len(storages) < len(tensors):  # some are parts of one
        tensors = {key: value.clone() for key, value in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: {error}; free space, or choose another folder") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it


# ---------------------------------------------------------------------------------------------
# The towers, as others describe them


def require_text(source, tool):
    if not isinstance(source.model, CLIP):
        raise InputError(
            f"{source.name} has no text tower, which {tool} needs; choose timm or onnx"
        )


def activation_of(visual):
    """The key of towers.ACTIVATIONS, or the class, of a ViT's activation; None: not found."""
    activation = getattr(getattr(visual.blocks[0], "mlp", None), "act", None)
    keys = {kind.__name__: key for key, kind in ACTIVATIONS.items()}
    name = type(activation).__name__
    return activation and keys.get(name, name)


def unlike_clip(model):
    """[the parts in which a model's image tower differs from CLIP's ViT]."""
    visual = model.visual
    if isinstance(getattr(visual, "head", None), timm.layers.AttentionPool2d):
        return ["an attention-pooled ResNet"]
    if not isinstance(visual, timm.models.VisionTransformer):
        return [f"timm's {type(visual).__name__}, no ViT"]
    activation = activation_of(visual)
    faults = {
        "a patch bias": visual.patch_embed.proj.bias is not None,
        "no norm_pre": isinstance(visual.norm_pre, nn.Identity),
        f"pooling by {visual.global_pool!r}": visual.global_pool != "token",
        f"activation {activation}": activation not in (None, *ACTIVATIONS),
    }
    faults = [fault for fault, is_so in faults.items() if is_so]
    try:
        layouts.to_open_clip(model.state_dict(), is_native=True)
    except InputError as error:
        faults.append(f"entries of its own ({error})")
    return faults


def vit_sizes(visual):
    """Layers, width, patch, heads and MLP width of a ViT, under our names."""
    block = visual.blocks[0]
    return {
        "layers": len(visual.blocks),
        "width": visual.embed_dim,
        "patch": visual.patch_embed.patch_size[0],
        "heads": block.attn.num_heads,
        "mlp": block.mlp.fc1.out_features,
        "eps": visual.norm.eps,
    }


def text_sizes(model):
    """Of CLIP's text tower."""
    block = model.transformer.resblocks[0]
    vocabulary, width = model.token_embedding.weight.shape
    return {
        "layers": len(model.transformer.resblocks),
        "width": width,
        "heads": block.attn.heads,
        "vocabulary": vocabulary,
        "length": model.preprocessing.context_length,
    }


def timm_args(source):
    """The arguments besides its name that build a timm tower."""
    args, size = source.tower.options, source.form.image_size
    usual = timm.get_pretrained_cfg_value(source.tower.timm_name, "input_size")
    if usual and usual[1] == size:
        return args
    sized = args | {"img_size": size}
    try:
        with torch.device("meta"):
            timm.create_model(source.tower.timm_name, **sized)
    except TypeError:  # convolutional towers know of no size
        return args
    return sized


# ---------------------------------------------------------------------------------------------
# open_clip


def write_open_clip(source, folder, home):
    require_text(source, "open_clip")
    model, form = source.model, source.form
    vision = own_vision(model)
    is_native = vision is not None
    if not is_native:
        vision = timm_vision(source, folder, home)
    tower = tower_of(source.name)
    activation = activation_of(model.visual) if is_native and model.text else form.activation
    bias = model.logit_bias
    config = {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            **({} if bias is None else {"init_logit_bias": bias.item()}),
            "quick_gelu": activation == "quick_gelu",  # of timm's towers: the text's alone
            "vision_cfg": {"image_size": form.image_size} | vision,
            "text_cfg": hf_text(model, folder, home) if model.text else own_text(model),
        },
        "preprocess_cfg": {
            "size": form.image_size,
            "mean": form.mean,
            "std": form.std,
            "interpolation": form.interpolation,
            "resize_mode": "shortest",
        },
        "slip": {"model": f"CLIP_{tower}", "preprocessing": form.to_dict()},  # for us to read
    }
    if model.text:
        config["slip"]["text_model"] = model.text.source.name
    utils.write_json(folder / "open_clip_config.json", config)
    weights = layouts.to_open_clip(model.state_dict(), is_native)
    save_tensors(folder / "open_clip_model.safetensors", weights)
    is_bound = vision.get("timm_model_name") == f"local-dir:{home}"
    return [MOVED] * is_bound + [MOVED_TEXT] * bool(model.text)


def own_text(model):
    """open_clip's text_cfg of CLIP's text tower."""
    text = text_sizes(model)
    return {
        "context_length": text["length"],
        "vocab_size": text["vocabulary"],
        "width": text["width"],
        "heads": text["heads"],
        "layers": text["layers"],
    }


def hf_text(model, folder, home):
    """The same of Hugging Face's: its configuration and tokenizer lie in a folder below.

    open_clip looks for the tokenizer in the folder itself.
    """
    model.text.source.write(folder / TEXT_FOLDER)
    model.text.source.write_tokenizer(folder)
    name = str(home / TEXT_FOLDER)
    return {
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": model.preprocessing.context_length,
    }


# For the README of a folder whose config names the folder itself.
MOVED = """open_clip_config.json names this folder by its path, because open_clip takes timm's
arguments from no other place. After moving the folder run this in it:

    python -c "import json, os; name = 'open_clip_config.json'; config = json.load(open(name)); \\
    config['model_cfg']['vision_cfg']['timm_model_name'] = 'local-dir:' + os.getcwd(); \\
    json.dump(config, open(name, 'w'), indent=1)"

On Hugging Face's hub the name is 'hf-hub:ORGANISATION/NAME', of the repository itself."""
MOVED_TEXT = """The text tower's configuration and tokenizer are in the folder text, which
open_clip_config.json names by its path. After moving the folder run this in it:

    python -c "import json, os; name = 'open_clip_config.json'; config = json.load(open(name)); \\
    text = dict.fromkeys(('hf_model_name', 'hf_tokenizer_name'), os.path.abspath('text')); \\
    config['model_cfg']['text_cfg'].update(text); json.dump(config, open(name, 'w'), indent=1)"
"""


def own_vision(model):
    """open_clip's vision_cfg of its own ViT or ResNet; None for a tower that is neither."""
    visual, is_biased = model.visual, model.image_projection_bias is not None
    if isinstance(getattr(visual, "head", None), timm.layers.AttentionPool2d) and is_biased:
        width = visual.stem.conv3.conv.out_channels
        layers = [len(stage) for stage in visual.stages]
        head_width = width * 32 // visual.head.num_heads
        return {"layers": layers, "width": width, "head_width": head_width}
    if unlike_clip(model):
        return None
    if not model.text and activation_of(visual) != model.preprocessing.activation:
        return None  # open_clip's own ViT has that of CLIP's text tower
    sizes = vit_sizes(visual)
    return {
        "layers": sizes["layers"],
        "width": sizes["width"],
        "patch_size": sizes["patch"],
        "head_width": sizes["width"] // sizes["heads"],
        "mlp_ratio": math.ceil(1e4 * sizes["mlp"] / sizes["width"]) / 1e4,  # it cuts the product
    }


def timm_vision(source, folder, home):
    """open_clip's vision_cfg of a timm tower.

    A tower with arguments besides its name opens by timm's config in the same folder, which
    open_clip only finds by a path.
    """
    args, visual, name = timm_args(source), source.model.visual, source.tower.timm_name
    with torch.device("meta"):
        trunk = timm.create_model(name, **args)
        trunk.reset_classifier(0)  # as open_clip does
    faults = mismatches(visual.state_dict(), trunk.state_dict())
    if faults or trunk.num_features != output_width(visual):
        text = describe_mismatches(faults) or f"a width of {trunk.num_features} features"
        raise InputError(f"open_clip would build {name} otherwise ({text}); take timm or onnx")
    if args:
        write_timm_config(source, args, folder)
        name = f"local-dir:{home}"
    return {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}


# ---------------------------------------------------------------------------------------------
# timm


ALONE = "The folder holds the image tower alone, without its projection and the text tower."


def write_timm(source, folder, home):
    write_timm_config(source, timm_args(source), folder)
    save_tensors(folder / "model.safetensors", source.model.visual.state_dict())
    return [ALONE] if isinstance(source.model, CLIP) else []


def write_timm_config(source, args, folder):
    form, visual = source.form, source.model.visual
    pretrained = {
        "input_size": [3, form.image_size, form.image_size],
        "interpolation": form.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": form.mean,
        "std": form.std,
        "num_classes": 0,
        # True: timm passes input_size to the tower. CLIP's ResNets have no size of their own.
        "fixed_input_size": visual.pretrained_cfg.get("fixed_input_size", False),
    }
    config = {
        "architecture": source.tower.timm_name,
        "num_classes": 0,
        "num_features": output_width(visual),
        "model_args": args,
        "pretrained_cfg": pretrained,
    }
    utils.write_json(folder / "config.json", config)


# ---------------------------------------------------------------------------------------------
# Hugging Face


def write_huggingface(source, folder, home):
    require_text(source, "transformers' CLIPModel")
    model, form = source.model, source.form
    text = [f"the text tower {model.text.source.name}"] if model.text else []
    if faults := unlike_clip(model) + text:
        parts = " and ".join(faults)
        raise InputError(
            f"{source.name} has {parts}, which transformers' CLIPModel cannot express; choose "
            "open_clip or onnx"
        )
    image, text = vit_sizes(model.visual), text_sizes(model)
    vision_config = {
        "hidden_size": image["width"],
        "intermediate_size": image["mlp"],
        "num_hidden_layers": image["layers"],
        "num_attention_heads": image["heads"],
        "patch_size": image["patch"],
        "image_size": form.image_size,
        "hidden_act": activation_of(model.visual),
        "layer_norm_eps": image["eps"],
        "projection_dim": model.embed_dim,
    }
    text_config = {
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["length"],
        "vocab_size": text["vocabulary"],
        "hidden_act": form.activation,
        "layer_norm_eps": model.ln_final.eps,
        "projection_dim": model.embed_dim,
        "bos_token_id": model.tokenizer.start,
        "eos_token_id": model.tokenizer.end,
        "pad_token_id": model.tokenizer.end,
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "vision_config": vision_config,
        "text_config": text_config,
    }
    utils.write_json(folder / "config.json", config)
    save_tensors(folder / "model.safetensors", layouts.to_huggingface(model.state_dict()))
    write_image_processor(form, folder)
    write_tokenizer(model.tokenizer, folder)
    notes = [] if model.logit_bias is None else [UNBIASED.format(model.logit_bias.item())]
    return [UNCLEANED, *notes]


UNCLEANED = """The tokenizer gives our ids for clean texts. It neither mends mis-decoded characters
nor unescapes HTML: ftfy.fix_text and html.unescape do."""


UNBIASED = """CLIPModel has no bias. The probability of a pair is the sigmoid, not the softmax, of
its logits plus the bias, {:.4f}. Embeddings do not depend on it."""


def write_image_processor(form, folder):
    size = form.image_size
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": {"bilinear": 2, "bicubic": 3}[form.interpolation],  # Pillow's numbers
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": form.mean,
        "image_std": form.std,
    }
    utils.write_json(folder / "preprocessor_config.json", config)


def write_tokenizer(tokenizer, folder):
    utils.write_json(folder / "vocab.json", tokenizer.encoder)
    lines = ["#version: 0.2", *map(" ".join, tokenizer.ranks)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    utils.write_json(folder / "special_tokens_map.json", special)
    length = {"model_max_length": tokenizer.context_length}
    kinds = {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor"}
    utils.write_json(folder / "tokenizer_config.json", special | length | kinds)
