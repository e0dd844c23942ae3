"""The methods CLIP, SimCLR and SLIP (arXiv:2112.12750): towers, projections, heads, `create_model`.

A model is `forward_head(forward_features(views))`: towers, then projections and heads on the
features of all views. State-dict keys are public: checkpoints released with the paper load here.
Shapes: B batch, S image side, L tokens, W width of the image tower, D joint embedding.
"""

import math
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from hf_text import HFText
from infra.batch_norm import SyncBatchNorm
from layers import Lockable
from text_models import with_text
from tokenizer import create_tokenizer
from towers import (
    KNOWN,
    TOWERS,
    TextTower,
    blocks_of,
    create_visual,
    find_tower,
    input_size,
    is_convolutional,
    output_width,
    resized,
)
from transforms import Augment, normalize, to_unit
from utils import InputError

MAX_LOGIT_SCALE = 4.6052  # ln(100)


# ---------------------------------------------------------------------------------------------
# SimCLR head


class SIMCLRHead(nn.Module):
    """Projects an image tower's output (B, W) to (B, out_dim) for the contrast of two views."""

    def __init__(self, in_dim, mlp_dim, out_dim):
        super().__init__()
        self.layer1 = nn.Linear(in_dim, mlp_dim)
        self.bn1 = SyncBatchNorm(mlp_dim)
        self.layer2 = nn.Linear(mlp_dim, mlp_dim)
        self.bn2 = SyncBatchNorm(mlp_dim)
        self.layer3 = nn.Linear(mlp_dim, out_dim)

    def forward(self, x):
        x = F.relu(self.bn1(self.layer1(x)))
        x = F.relu(self.bn2(self.layer2(x)))
        return self.layer3(x)


# ---------------------------------------------------------------------------------------------
# Methods


class Method(Lockable, nn.Module):
    """An image tower, and heads that are trained on the features of all views.

    A subclass says which `views` it takes and which `loss` (a row of losses.LOSSES) trains it.
    The two halves of `forward` serve gradients that are exact over many micro-batches
    (engine.accumulate_exact).
    """

    views = ()

    def __init__(self, tower, ssl_mlp_dim=None, ssl_emb_dim=None):
        super().__init__()
        self.visual = create_visual(tower)
        size = tower.preprocessing.image_size or input_size(self.visual)
        self.preprocessing = replace(tower.preprocessing, image_size=size)
        self.num_features = self.embed_dim = output_width(self.visual)
        self.is_convolutional = is_convolutional(self.visual)
        self.augment = Augment()

    @property
    def image_size(self):
        """S, in pixels."""
        return self.preprocessing.image_size

    def to(self, *args, **options):
        """As of any module; convolutions on CUDA take the layout in memory that is fastest there.

        On the CPU PyTorch's kernels for it end the process at some towers (timm's fastvit_t8).
        """
        super().to(*args, **options)
        if self.is_convolutional:
            is_cuda = next(self.parameters()).is_cuda
            layout = torch.channels_last if is_cuda else torch.contiguous_format
            self.visual.to(memory_format=layout)
        return self

    def forward(self, **views):
        return self.forward_head(self.forward_features(**views))

    def forward_features(self, ids=None, **images):
        """Views (B, 3, S, S) -> {view: (B, W) features}. ids of the samples pass, for the loss.

        All views take one pass, but not through batch norm, whose statistics are of one view.
        """
        passed = {} if ids is None else {"ids": ids}
        if self.is_convolutional or not images:
            return {view: self.visual(x) for view, x in images.items()} | passed
        features = self.visual(torch.cat(list(images.values())))
        return dict(zip(images, features.chunk(len(images)), strict=True)) | passed

    def forward_head(self, features):
        return {"ids": features["ids"]} if "ids" in features else {}

    @torch.no_grad()  # in every pass of an update, so that the augmentation compiles once
    def normalize(self, images, steps=None):
        """(B, 3, S, S) uint8 -> float32, with the mean and deviation that the tower expects.

        steps: augmentation still to be done, (B, 8, 3), as transforms.pack_steps packs it.
        """
        unit = to_unit(images) if steps is None else self.augment(images, steps)
        return normalize(unit, self.preprocessing.mean, self.preprocessing.std)

    def encode_image(self, image):
        """(B, 3, S, S) normalised images -> (B, W), before any head."""
        return self.visual(image)

    def blocks(self):
        """The modules to compile."""
        return [self.augment, *blocks_of(self.visual)]

    def set_grad_checkpointing(self):
        """Recomputes the towers' activations block by block in backward: less memory, more time.

        Raises InputError if timm's tower cannot.
        """
        try:
            self.visual.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise InputError(
                "timm's image tower has no gradient checkpointing; train without it"
            ) from error


class CLIP(TextTower, Method):
    """An image tower and a text tower trained to agree on pairs (Radford et al., 2021)."""

    views, loss = ("image", "text"), "clip"

    def __init__(self, tower, ssl_mlp_dim=None, ssl_emb_dim=None):
        super().__init__(tower)
        self.text = HFText(tower) if tower.text_model else None
        if not self.text:  # CLIP's own, whose order of parameters released checkpoints have
            self.add_text_tower(tower)
        self.embed_dim = tower.embed_dim
        self.image_projection = nn.Parameter(torch.empty(self.num_features, self.embed_dim))
        bias = nn.Parameter(torch.zeros(self.embed_dim)) if tower.projection_bias else None
        self.register_parameter("image_projection_bias", bias)
        if not self.text:
            self.text_projection = nn.Parameter(torch.empty(tower.text_width, self.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.register_parameter("logit_bias", None)
        if not self.text:
            self.init_text_tower()
        nn.init.normal_(self.image_projection, std=self.num_features**-0.5)
        if not self.text:
            nn.init.normal_(self.text_projection, std=tower.text_width**-0.5)

    @property
    def text_tower(self):
        """Hugging Face's, a module, or this model itself, which holds the parts of CLIP's."""
        return self.text or self

    def add_logit_bias(self, start):
        """A learned bias of the logits for the sigmoid loss, and its temperature (SigLIP's)."""
        self.logit_bias = nn.Parameter(torch.tensor(float(start)))
        nn.init.constant_(self.logit_scale, math.log(10))

    @cached_property
    def tokenizer(self):
        return create_tokenizer(self.preprocessing, self.text and self.text.source)

    def project_image(self, x):
        """(B, W) -> (B, D)."""
        return F.linear(x, self.image_projection.T, self.image_projection_bias)

    def encode_image(self, image):
        """(B, 3, S, S) normalised images -> (B, D), not normalised."""
        return self.project_image(self.visual(image))

    def encode_text(self, text):
        """(B, L) token ids -> (B, D), not normalised."""
        return self.text_tower.project_text(self.text_tower.forward_text(text))

    def forward_features(self, text=None, **images):
        own = {} if text is None else {"text": self.text_tower.forward_text(text)}
        return super().forward_features(**images) | own

    def forward_head(self, features):
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {
            **super().forward_head(features),
            "image_embed": self.project_image(features["image"]),  # (B, D)
            "text_embed": self.text_tower.project_text(features["text"]),  # (B, D)
            "logit_scale": self.logit_scale.exp(),
            **bias,
        }

    def blocks(self):
        return [*super().blocks(), *self.text_tower.text_blocks()]

    def set_grad_checkpointing(self):
        super().set_grad_checkpointing()
        self.text_tower.set_text_checkpointing()

    @torch.no_grad()
    def clamp_logit_scale(self):
        """Keeps the temperature at 0.01 or above (CLIP, section 2.5); called after each update."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def contrast_views(head, features):
    """The SimCLR head on one view at a time: batch statistics are those of one view."""
    return {f"{view}_embed": head(features[view]) for view in ("aug1", "aug2")}


class SIMCLR(Method):
    """An image tower trained to agree on two views of an image (Chen et al., 2020)."""

    views, loss = ("aug1", "aug2"), "simclr"

    def __init__(self, tower, ssl_mlp_dim=4096, ssl_emb_dim=256):
        super().__init__(tower)
        self.image_mlp = SIMCLRHead(self.num_features, ssl_mlp_dim, ssl_emb_dim)

    def forward_head(self, features):
        return {**super().forward_head(features), **contrast_views(self.image_mlp, features)}


class SLIP(CLIP):
    """CLIP and SimCLR on one image tower (Mu et al., arXiv:2112.12750)."""

    views, loss = ("image", "text", "aug1", "aug2"), "slip"

    def __init__(self, tower, ssl_mlp_dim=4096, ssl_emb_dim=256):
        super().__init__(tower)
        self.image_mlp = SIMCLRHead(self.num_features, ssl_mlp_dim, ssl_emb_dim)

    def forward_head(self, features):
        return {**super().forward_head(features), **contrast_views(self.image_mlp, features)}


METHODS = {"CLIP": CLIP, "SIMCLR": SIMCLR, "SLIP": SLIP}


def parse_name(name):
    """SLIP_VITB16 -> (SLIP, its Tower); the tower may be any timm model (CLIP_convnext_tiny)."""
    method, _, tower = name.partition("_")
    try:
        return METHODS[method], find_tower(tower)
    except (KeyError, InputError):
        raise InputError(
            f"unknown model {name!r}; choose METHOD_TOWER with METHOD from {', '.join(METHODS)} "
            f"and TOWER from {KNOWN}"
        ) from None


def list_models():
    """The names of all models, but those with one of timm's image towers."""
    return [f"{method}_{tower}" for method in METHODS for tower in TOWERS]


def create_model(
    name,
    ssl_mlp_dim=4096,
    ssl_emb_dim=256,
    preprocessing=None,
    image_size=None,
    patch_dropout=0.0,
    text_model=None,
):
    """Builds a model by name, randomly initialised.

    Args:
        name: METHOD_TOWER, as "SLIP_VITB16".
        ssl_mlp_dim: hidden width of the SimCLR head, if the method has one.
        ssl_emb_dim: output width of that head.
        preprocessing: a Preprocessing other than that of the tower's row.
        image_size: in pixels; None: that of the preprocessing, or else the tower's.
        patch_dropout: share of a ViT's patches that training leaves out (FLIP, arXiv:2212.00794).
        text_model: a TextModel; None: that of the tower's row, most often CLIP's own text tower.

    Raises InputError for an unknown name, and for a size or dropout that the tower cannot take.
    """
    method, tower = parse_name(name)
    tower = replace(tower, preprocessing=preprocessing or tower.preprocessing)
    tower = with_text(tower, text_model or tower.text_model)
    if patch_dropout:
        tower = replace(tower, options=tower.options | {"patch_drop_rate": patch_dropout})
    return method(resized(tower, image_size), ssl_mlp_dim, ssl_emb_dim)
