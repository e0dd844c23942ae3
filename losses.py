"""The contrastive losses: CLIP, SimCLR and their sum, SLIP (arXiv:2112.12750, section 3).

Each takes the model's output dict and returns {"loss", ...metrics}, scalars on the model's device,
for this rank's rows against all ranks'. Accuracies are in percent and carry no gradient.
Shapes: B local batch, N global batch, D embedding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import gather, get_rank


def normalize(embed):
    """Unit rows, in float32 even under mixed precision (float64 stays)."""
    return F.normalize(embed if embed.dtype == torch.float64 else embed.float(), dim=-1)


def local_labels(embed):
    """The columns, among all ranks' rows, of this rank's B rows: (B,)."""
    return torch.arange(len(embed), device=embed.device) + len(embed) * get_rank()


def symmetric_cross_entropy(logits_a, logits_b, labels):
    return (F.cross_entropy(logits_a, labels) + F.cross_entropy(logits_b, labels)) / 2


@torch.no_grad()
def accuracy(logits, labels):
    return 100 * (logits.argmax(-1) == labels).float().mean()


class CLIPLoss(nn.Module):
    """Cross-entropy of images against all texts and of texts against all images, halved.

    On several ranks the archived code, and the default here, sends no gradient through the
    gathered embeddings. gather_with_grad sends it, which equals one process on the whole batch.
    """

    def __init__(self, gather_with_grad=False):
        super().__init__()
        self.gather_with_grad = gather_with_grad

    def forward(self, outputs):
        image, text = normalize(outputs["image_embed"]), normalize(outputs["text_embed"])  # (B, D)
        scale, labels = outputs["logit_scale"].to(image.dtype), local_labels(image)
        with torch.autocast(image.device.type, enabled=False):
            logits_per_image = scale * image @ gather(text, self.gather_with_grad).T  # (B, N)
            logits_per_text = scale * text @ gather(image, self.gather_with_grad).T  # (B, N)
        loss = symmetric_cross_entropy(logits_per_image, logits_per_text, labels)
        return {"loss": loss, "clip_loss": loss, "clip_acc": accuracy(logits_per_image, labels)}


class SIMCLRLoss(nn.Module):
    """NT-Xent (Chen et al., 2020): each view against the other view and its own other rows.

    Gradient flows through the gathered embeddings; backward sums it over the ranks.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs):
        a, b = normalize(outputs["aug1_embed"]), normalize(outputs["aug2_embed"])  # (B, D)
        labels = local_labels(a)
        with torch.autocast(a.device.type, enabled=False):
            all_a, all_b = gather(a, with_grad=True), gather(b, with_grad=True)  # (N, D)
            logits_a = self.logits(a, all_b, all_a, labels)
            logits_b = self.logits(b, all_a, all_b, labels)
        loss = symmetric_cross_entropy(logits_a, logits_b, labels)
        return {"loss": loss, "ssl_loss": loss, "ssl_acc": accuracy(logits_a, labels)}

    def logits(self, query, other_view, same_view, labels):
        """(B, 2N): similarities to the other view, then to the own view without oneself."""
        same = (query @ same_view.T).scatter(1, labels[:, None], -torch.inf)
        return torch.cat([query @ other_view.T, same], dim=1) / self.temperature


class SLIPLoss(nn.Module):
    """clip_loss + ssl_scale * ssl_loss."""

    def __init__(self, ssl_loss, ssl_scale, gather_with_grad=False):
        super().__init__()
        self.clip_loss = CLIPLoss(gather_with_grad)
        self.ssl_loss = ssl_loss
        self.ssl_scale = ssl_scale

    def forward(self, outputs):
        clip, ssl = self.clip_loss(outputs), self.ssl_loss(outputs)
        return {**clip, **ssl, "loss": clip["clip_loss"] + self.ssl_scale * ssl["ssl_loss"]}
