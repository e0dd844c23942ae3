"""Image and text towers, and the table of their sizes.

An image tower is a timm model without its classifier. The text tower is CLIP's causal transformer
(Radford et al., 2021, section 2.4). Shapes: B batch, S image side, L tokens, W width of a tower.
"""

from dataclasses import dataclass, field, replace

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from layers import Layers
from preprocessing import CLIP_PREPROCESSING, SLIP_PREPROCESSING, Preprocessing
from text_models import TEXTS, TextModel, with_text
from utils import InputError

VOCAB_SIZE = 49408


@dataclass(frozen=True)
class Tower:
    """One image tower by its timm name and options, and the text tower that goes with it."""

    timm_name: str
    options: dict = field(default_factory=dict)
    embed_dim: int = 512
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    projection_bias: bool = False  # of the image tower's projection
    preprocessing: Preprocessing = SLIP_PREPROCESSING
    text_model: TextModel | None = field(default=None, repr=False)  # in the place of CLIP's


def clip_tower(timm_name, embed_dim, text_width=512, text_layers=12, **fields):
    """A row of CLIP and open_clip, whose text towers have heads of width 64."""
    heads, fields = text_width // 64, {"preprocessing": CLIP_PREPROCESSING} | fields
    return Tower(timm_name, {}, embed_dim, text_width, heads, text_layers, **fields)


def with_quick_gelu(tower):
    """The row of weights that were trained with QuickGELU, as OpenAI's; its ResNets have ReLU."""
    is_vit = tower.timm_name.startswith("vit_")
    options = tower.options | ({"act_layer": "quick_gelu"} if is_vit else {})
    form = replace(tower.preprocessing, activation="quick_gelu")
    return replace(tower, options=options, preprocessing=form)


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
SLIP_TOWERS = {  # the paper's; MoCo v3's ViT-S has 12 heads, timm's has 6
    "VITS16": Tower("vit_small_patch16_224", {"num_heads": 12}),
    "VITB16": Tower("vit_base_patch16_224"),
    "VITL16": Tower("vit_large_patch16_224"),
    # For the demo and the tests: 32-pixel images.
    "VITTINY8": Tower("vit_tiny_patch16_224", TINY_VIT, 128, 128, 4, 2),
}
CLIP_TOWERS = {  # names, sizes and values of open_clip
    "ViT-B-32": clip_tower("vit_base_patch32_clip_224", 512),
    "ViT-B-16": clip_tower("vit_base_patch16_clip_224", 512),
    "ViT-B-16-plus-240": clip_tower("vit_base_patch16_plus_clip_240", 640, 640),
    "ViT-L-14": clip_tower("vit_large_patch14_clip_224", 768, 768),
    "ViT-L-14-336": clip_tower("vit_large_patch14_clip_336", 768, 768),
    "ViT-H-14": clip_tower("vit_huge_patch14_clip_224", 1024, 1024, 24),
    "ViT-g-14": clip_tower("vit_giant_patch14_clip_224", 1024, 1024, 24),
    "RN50": clip_tower("resnet50_clip", 1024, projection_bias=True),
    "RN101": clip_tower("resnet101_clip", 512, projection_bias=True),
    "RN50x4": clip_tower("resnet50x4_clip", 640, 640, projection_bias=True),
    "RN50x16": clip_tower("resnet50x16_clip", 768, 768, projection_bias=True),
    "RN50x64": clip_tower("resnet50x64_clip", 1024, 1024, projection_bias=True),
}
QUICK_TOWERS = {f"{name}-quickgelu": with_quick_gelu(row) for name, row in CLIP_TOWERS.items()}
HF_TOWERS = {  # open_clip's with a text tower of Hugging Face
    "roberta-ViT-B-32": with_text(QUICK_TOWERS["ViT-B-32-quickgelu"], TEXTS["roberta-base"]),
    "xlm-roberta-base-ViT-B-32": with_text(CLIP_TOWERS["ViT-B-32"], TEXTS["xlm-roberta-base"]),
    "xlm-roberta-large-ViT-H-14": with_text(CLIP_TOWERS["ViT-H-14"], TEXTS["xlm-roberta-large"]),
}
TOWERS = SLIP_TOWERS | CLIP_TOWERS | QUICK_TOWERS | HF_TOWERS
KNOWN = f"{', '.join(SLIP_TOWERS)}, {', '.join(CLIP_TOWERS)} (also with -quickgelu), "
KNOWN += f"{', '.join(HF_TOWERS)}, or any model of timm"


# ---------------------------------------------------------------------------------------------
# Image tower


def is_tower(name):
    return name in TOWERS or timm.is_model(name)


def find_tower(name):
    """The row of a tower, or one for any model name of timm. Raises InputError for another."""
    if not is_tower(name):
        raise InputError(f"unknown tower {name!r}; choose from {KNOWN}")
    return TOWERS.get(name) or Tower(name)


def resized(tower, image_size):
    """The row for another image size in pixels; None: the same."""
    form = tower.preprocessing
    size = image_size or form.image_size
    return replace(tower, preprocessing=replace(form, image_size=size))


def create_visual(tower, **options):
    """The timm image tower without its classifier: images (B, 3, S, S) -> (B, W).

    Convolutional towers take images of any size; others have positions for tower's image size.
    Raises InputError for a size or an option that the tower cannot take.
    """
    size, options = tower.preprocessing.image_size, {"num_classes": 0} | tower.options | options
    try:
        visual = build(tower.timm_name, options | ({"img_size": size} if size else {}))
    except TypeError:  # timm's convolutional towers know of no size
        visual = build(tower.timm_name, options)
    check_size(visual, size or input_size(visual))
    return visual


def build(timm_name, options):
    try:
        return timm.create_model(timm_name, **options)
    except TypeError as error:
        if "patch_drop_rate" not in str(error):
            raise
        raise InputError(f"{timm_name} cannot leave out patches; omit patch dropout") from error
    except AssertionError as error:
        raise InputError(f"{timm_name} of this image size: {error}; choose another") from error


def check_size(visual, size):
    """Raises InputError if the patches of a ViT, or a CLIP ResNet's strides, do not divide S."""
    patch = getattr(getattr(visual, "patch_embed", None), "patch_size", 1)
    patch = timm.layers.to_2tuple(patch)[0]  # XCiT's is a number
    if isinstance(getattr(visual, "head", None), timm.layers.AttentionPool2d):
        patch = 32
    if size % patch:
        raise InputError(f"image size {size} is no multiple of the patch of {patch} pixels")


def output_width(visual):
    """W of a timm tower: some of its models (MobileNetV3) widen the features in their head."""
    return getattr(visual, "head_hidden_size", visual.num_features)


def input_size(visual):
    """The side S of the square images that a timm tower takes, in pixels."""
    patches = getattr(visual, "patch_embed", None)
    size = getattr(patches, "img_size", None) or visual.pretrained_cfg["input_size"][1:]
    return size[0]


def is_convolutional(visual):
    """Whether a tower convolves beyond its patch embedding, or has batch norm inside."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in visual.modules())
    return convolutions > 1 or has_batch_norm(visual)


def blocks_of(visual):
    """The modules of a tower to compile, one by one: those alike share one compilation."""
    parts = getattr(visual, "blocks", None)
    return [visual] if parts is None or is_convolutional(visual) else list(parts)


def has_batch_norm(visual):
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in visual.modules())


# ---------------------------------------------------------------------------------------------
# Text tower


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it.

    Parameters are named as nn.MultiheadAttention names them.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):  # (B, L, W)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3W)
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # query, key, value: (B, heads, L, W/heads) each
        x = F.scaled_dot_product_attention(*qkv, is_causal=True)  # (B, heads, L, W/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, W)


class MLP(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = CausalSelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.Sequential(
            *[ResidualAttentionBlock(width, heads, activation) for _ in range(layers)]
        )
        self.grad_checkpointing = False

    def forward(self, x):
        for block in self.resblocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x


class TextTower:
    """CLIP's text tower, a base class of the methods that read text.

    It is no module of its own: released checkpoints hold its keys flat ("token_embedding.weight"),
    and optimizer states load by the order of parameters. hf_text.HFText has the same methods.
    """

    vocabulary, padding = VOCAB_SIZE, 0

    def add_text_tower(self, tower):
        width, form = tower.text_width, tower.preprocessing
        self.transformer = Transformer(width, tower.text_layers, tower.text_heads, form.activation)
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.empty(form.context_length, width))
        self.ln_final = nn.LayerNorm(width)

    def init_text_tower(self):
        """CLIP's initialisation: deeper towers start with smaller residual branches."""
        width, layers = self.token_embedding.embedding_dim, len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def text_layers(self):
        blocks = [[f"transformer.resblocks.{i}"] for i in range(len(self.transformer.resblocks))]
        stem = ["token_embedding", "positional_embedding"]
        return Layers(stem, blocks, ["ln_final"], ["text_projection"], locks_projection=False)

    def forward_text(self, text):
        """(B, L) token ids -> (B, W)."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # (B, L, W)
        x = self.ln_final(self.transformer(x))
        return POOLINGS[self.preprocessing.pooling](x, text)

    def project_text(self, x):
        """(B, W) -> (B, D)."""
        return x @ self.text_projection

    def text_blocks(self):
        """The modules to compile."""
        return list(self.transformer.resblocks)

    def set_text_checkpointing(self):
        self.transformer.grad_checkpointing = True


def pool_end(x, text):
    """(B, L, W) -> (B, W), at the end-of-text token, which has the highest id."""
    rows = torch.arange(x.shape[0], device=x.device)  # not len(x), which exports as a constant
    return x[rows, text.argmax(-1)]


POOLINGS = {"argmax": pool_end}
