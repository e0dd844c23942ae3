"""CLIP, SimCLR and SLIP: image and text towers, projections, and `create_model`.

Shapes: B batch, L tokens (77), W width of a tower, D joint embedding.

State-dict keys are public: checkpoints released with the paper (arXiv:2112.12750) load here.
"""

import timm
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
import torch.nn.functional as F
from torch import nn

from towers import (
    CONTEXT_LENGTH,
    TOWERS,
    VOCAB_SIZE,
    Tower,
    Transformer,
    create_visual,
    input_size,
    is_convolutional,
    output_width,
)
from utils import InputError

MAX_LOGIT_SCALE = 4.6052  # ln(100)


# ---------------------------------------------------------------------------------------------
# Text tower


# ---------------------------------------------------------------------------------------------
# SimCLR head


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch norm whose training statistics span all ranks, on CUDA and on the CPU alike.

    (torch.nn.SyncBatchNorm refuses CPU tensors.) On one rank it is nn.BatchNorm1d.
    """

    def forward(self, x):  # (B, W)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            full = x if x.dtype == torch.float64 else x.float()
            count = len(full) * dist.get_world_size()
            mean = dist_grad.all_reduce(full.sum(0)) / count
            centred = full - mean
            var = dist_grad.all_reduce(centred.square().sum(0)) / count
            with torch.no_grad():  # running_var is the unbiased estimate, as in nn.BatchNorm1d
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
            return (centred * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


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


class Method(nn.Module):
    """An image tower, and heads that are trained on the features of all views.

    `forward` is heads(towers(views)); the two halves serve gradients that are exact over many
    micro-batches (engine.accumulate_exact).
    """

    def __init__(self, tower):
        super().__init__()
        self.visual = create_visual(tower)
        self.image_size = input_size(self.visual)
        self.is_convolutional = is_convolutional(self.visual)
        if self.is_convolutional:
            self.visual.to(memory_format=torch.channels_last)

    def towers(self, **images):
        """Views (B, 3, S, S) -> {view: (B, W) features}; in one pass, but not through batch norm,
        whose statistics are of one view."""
        if self.is_convolutional:
            return {view: self.visual(x) for view, x in images.items()}
        features = self.visual(torch.cat(list(images.values())))
        return dict(zip(images, features.chunk(len(images)), strict=True))

    def forward(self, **views):
        return self.heads(self.towers(**views))

    def blocks(self):
        """The modules to compile, one by one: blocks that are alike share one compilation."""
        blocks = getattr(self.visual, "blocks", None)
        return [self.visual] if self.is_convolutional or blocks is None else list(blocks)

    def checkpoint_gradients(self):
        """Recomputes the towers' activations block by block in backward: less memory, more time.

        Raises InputError where timm's tower cannot.
        """
        try:
            self.visual.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise InputError(
                "--grad-checkpointing: timm's image tower has none; leave it"
            ) from error


class CLIP(Method):
    """An image tower and a text tower trained to agree on pairs (Radford et al., 2021)."""

    views = ("image", "text")

    def __init__(self, tower, ssl_mlp_dim=None, ssl_emb_dim=None):
        super().__init__(tower)
        width, image_width = tower.text_width, output_width(self.visual)
        self.transformer = Transformer(width, tower.text_layers, tower.text_heads)
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT_LENGTH, width))
        self.ln_final = nn.LayerNorm(width)
        self.image_projection = nn.Parameter(torch.empty(image_width, tower.embed_dim))
        self.text_projection = nn.Parameter(torch.empty(width, tower.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.init_parameters()

    def init_parameters(self):
        width, layers = self.token_embedding.embedding_dim, len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.image_projection, std=len(self.image_projection) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def read(self, text):
        """(B, L) token ids -> (B, W), at the end-of-text token, which has the highest id."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # (B, L, W)
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x), device=x.device), text.argmax(-1)]

    def encode_image(self, image):
        """(B, 3, S, S) normalised images -> (B, D), not normalised."""
        return self.visual(image) @ self.image_projection

    def encode_text(self, text):
        """(B, L) token ids -> (B, D), not normalised."""
        return self.read(text) @ self.text_projection

    def towers(self, text, **images):
        return {**super().towers(**images), "text": self.read(text)}

    def heads(self, features):
        return {
            "image_embed": features["image"] @ self.image_projection,
            "text_embed": features["text"] @ self.text_projection,
            "logit_scale": self.logit_scale.exp(),
        }

    def blocks(self):
        return [*super().blocks(), *self.transformer.resblocks]

    def checkpoint_gradients(self):
        super().checkpoint_gradients()
        self.transformer.checkpointing = True

    @torch.no_grad()
    def clamp_logit_scale(self):
        """Keeps the temperature at 0.01 or above (CLIP, section 2.5); called after each update."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def contrast_views(head, features):
    """The SimCLR head on one view at a time: batch statistics are those of one view."""
    return {f"{view}_embed": head(features[view]) for view in ("aug1", "aug2")}


class SIMCLR(Method):
    """An image tower trained to agree on two views of an image (Chen et al., 2020)."""

    views = ("aug1", "aug2")

    def __init__(self, tower, ssl_mlp_dim=4096, ssl_emb_dim=256):
        super().__init__(tower)
        self.image_mlp = SIMCLRHead(output_width(self.visual), ssl_mlp_dim, ssl_emb_dim)

    def encode_image(self, image):
        """(B, 3, S, S) normalised images -> (B, W), before the head."""
        return self.visual(image)

    def heads(self, features):
        return contrast_views(self.image_mlp, features)


class SLIP(CLIP):
    """CLIP and SimCLR on one image tower (Mu et al., arXiv:2112.12750)."""

    views = ("image", "text", "aug1", "aug2")

    def __init__(self, tower, ssl_mlp_dim=4096, ssl_emb_dim=256):
        super().__init__(tower)
        self.image_mlp = SIMCLRHead(output_width(self.visual), ssl_mlp_dim, ssl_emb_dim)

    def heads(self, features):
        return {**super().heads(features), **contrast_views(self.image_mlp, features)}


METHODS = {"CLIP": CLIP, "SIMCLR": SIMCLR, "SLIP": SLIP}


def parse_name(name):
    """SLIP_VITB16 -> (SLIP, its Tower); the tower may be any timm model (CLIP_convnext_tiny)."""
    method, _, tower = name.partition("_")
    if method not in METHODS or not (tower in TOWERS or timm.is_model(tower)):
        raise InputError(
            f"unknown model {name!r}; choose METHOD_TOWER with METHOD in {', '.join(METHODS)} "
            f"and TOWER in {', '.join(TOWERS)} or any model name of timm"
        )
    return METHODS[method], TOWERS.get(tower) or Tower(tower)


def create_model(name, ssl_mlp_dim=4096, ssl_emb_dim=256):
    """Builds a model by name, randomly initialised. Raises InputError for an unknown name.

    ssl_mlp_dim, ssl_emb_dim: hidden and output width of the SimCLR head, where there is one.
    """
    method, tower = parse_name(name)
    return method(tower, ssl_mlp_dim, ssl_emb_dim)
