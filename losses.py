"""The contrastive losses: CLIP, SimCLR and their sum, SLIP (arXiv:2112.12750, section 3).

Each takes the model's output dict and returns {"loss", ...metrics}, scalars on the model's device,
for this rank's rows against all ranks'. Accuracies are in percent and carry no gradient.
Shapes: B local batch, N global batch, D embedding.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from infra.distributed import all_gather, get_rank

ROWS = 1024  # of the similarity matrix that exist at once


def normalize(embed):
    """Unit rows, in float32 even under mixed precision (float64 stays)."""
    return F.normalize(embed if embed.dtype == torch.float64 else embed.float(), dim=-1)


def local_labels(embed):
    """The columns, among all ranks' rows, of this rank's B rows: (B,)."""
    return torch.arange(len(embed), device=embed.device) + len(embed) * get_rank()


class RowLoss(nn.Module):
    """Some rows of a similarity matrix: the sum of their cross-entropies, and how many are right.

    queries (R, D), keys (K, D), labels (R,) the key of each query, hidden (R,) a key that a query
    must not see, or None.
    """

    def forward(self, queries, keys, labels, scale, hidden=None):
        logits = scale * queries @ keys.T
        if hidden is not None:
            logits = logits.scatter(1, hidden[:, None], -torch.inf)
        hits = (logits.detach().argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), hits


class InfoNCE(nn.Module):
    """Mean cross-entropy of queries against keys, and accuracy in percent.

    ROWS rows of the matrix at a time, recomputed in backward: memory grows with the keys alone.
    """

    def __init__(self):
        super().__init__()
        self.rows = RowLoss()

    def forward(self, queries, keys, labels, scale, hidden=None):
        total = hits = 0
        for start in range(0, len(queries), ROWS):
            part = slice(start, start + ROWS)
            arguments = queries[part], keys, labels[part], scale
            arguments += (hidden if hidden is None else hidden[part],)
            loss, right = checkpoint(
                self.rows, *arguments, use_reentrant=False, preserve_rng_state=False
            )
            total, hits = total + loss, hits + right
        return total / len(queries), 100 * hits / len(queries)


class CLIPLoss(nn.Module):
    """Cross-entropy of images against all texts and of texts against all images, halved.

    On several ranks the archived code, and the default here, sends no gradient through the
    gathered embeddings. gather_with_grad sends it, which equals one process on the whole batch.
    """

    def __init__(self, gather_with_grad=False):
        super().__init__()
        self.gather_with_grad = gather_with_grad
        self.contrast = InfoNCE()

    def forward(self, outputs):
        image, text = normalize(outputs["image_embed"]), normalize(outputs["text_embed"])  # (B, D)
        scale, labels = outputs["logit_scale"].to(image.dtype), local_labels(image)
        with torch.autocast(image.device.type, enabled=False):
            all_image, all_text = (
                all_gather(x, self.gather_with_grad) for x in (image, text)
            )  # (N, D)
            by_image, acc = self.contrast(image, all_text, labels, scale)
            by_text, _ = self.contrast(text, all_image, labels, scale)
        loss = (by_image + by_text) / 2
        return {"loss": loss, "clip_loss": loss, "clip_acc": acc}


class SIMCLRLoss(nn.Module):
    """NT-Xent (Chen et al., 2020): each view against the other view and its own other rows.

    Gradient flows through the gathered embeddings; backward sums it over the ranks.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature
        self.contrast = InfoNCE()

    def forward(self, outputs):
        a, b = normalize(outputs["aug1_embed"]), normalize(outputs["aug2_embed"])  # (B, D)
        labels, scale = local_labels(a), 1 / self.temperature
        with torch.autocast(a.device.type, enabled=False):
            all_a, all_b = all_gather(a, with_grad=True), all_gather(b, with_grad=True)  # (N, D)
            own = labels + len(all_a)  # oneself, among the keys
            of_a, acc = self.contrast(a, torch.cat([all_b, all_a]), labels, scale, own)
            of_b, _ = self.contrast(b, torch.cat([all_a, all_b]), labels, scale, own)
        loss = (of_a + of_b) / 2
        return {"loss": loss, "ssl_loss": loss, "ssl_acc": acc}


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
