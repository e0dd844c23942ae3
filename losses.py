"""The contrastive losses: CLIP, SimCLR and their sum, SLIP (arXiv:2112.12750, section 3).

Each takes the model's output dict and returns {"loss", ...metrics}: scalars on the model's device,
for this rank's rows against the rows of all ranks. Accuracies are in percent, without gradient.
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
    """The columns, among the rows of all ranks, of this rank's B rows: (B,)."""
    return torch.arange(len(embed), device=embed.device) + len(embed) * get_rank()


class RowLoss(nn.Module):
    """The summed cross-entropy of some rows of a similarity matrix, and the number of hits."""

    def forward(self, queries, keys, labels, scale, hidden=None):
        """
        Args:
            queries: (R, D) unit rows.
            keys: (K, D) unit rows.
            labels: (R,) the key that matches each query.
            scale: the inverse temperature.
            hidden: (R,) a key that each query must not see, or None.
        """
        logits = scale * queries @ keys.T  # (R, K)
        if hidden is not None:
            logits = logits.scatter(1, hidden[:, None], -torch.inf)
        hits = (logits.detach().argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), hits


class InfoNCE(nn.Module):
    """-log(exp(s q.k+) / sum_k exp(s q.k)), the mean over queries q, and accuracy in percent.

    (van den Oord et al., 2018.) ROWS rows of the matrix at a time, recomputed in backward: memory
    grows with the number of keys, not with its square. Takes the arguments of RowLoss.
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

    def blocks(self):
        """The modules to compile."""
        return [self.rows]


class CLIPLoss(nn.Module):
    """(InfoNCE(image, texts) + InfoNCE(text, images)) / 2, at the learned temperature.

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
            images, texts = (all_gather(x, self.gather_with_grad) for x in (image, text))  # (N, D)
            by_image, acc = self.contrast(image, texts, labels, scale)
            by_text, _ = self.contrast(text, images, labels, scale)
        loss = (by_image + by_text) / 2
        return {"loss": loss, "clip_loss": loss, "clip_acc": acc}

    def blocks(self):
        return self.contrast.blocks()


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
            own = labels + len(all_a)  # a row itself, among the keys
            of_a, acc = self.contrast(a, torch.cat([all_b, all_a]), labels, scale, own)
            of_b, _ = self.contrast(b, torch.cat([all_a, all_b]), labels, scale, own)
        loss = (of_a + of_b) / 2
        return {"loss": loss, "ssl_loss": loss, "ssl_acc": acc}

    def blocks(self):
        return self.contrast.blocks()


class SLIPLoss(nn.Module):
    """clip_loss + ssl_scale * ssl_loss."""

    def __init__(self, ssl_loss, ssl_scale=1.0, gather_with_grad=False):
        super().__init__()
        self.clip_loss = CLIPLoss(gather_with_grad)
        self.ssl_loss = ssl_loss
        self.ssl_scale = ssl_scale

    def forward(self, outputs):
        clip, ssl = self.clip_loss(outputs), self.ssl_loss(outputs)
        return {**clip, **ssl, "loss": clip["clip_loss"] + self.ssl_scale * ssl["ssl_loss"]}

    def blocks(self):
        return [*self.clip_loss.blocks(), *self.ssl_loss.blocks()]


LOSSES = {  # by the `loss` of a method
    "clip": lambda temperature, ssl_scale, with_grad: CLIPLoss(with_grad),
    "simclr": lambda temperature, ssl_scale, with_grad: SIMCLRLoss(temperature),
    "slip": lambda temperature, ssl_scale, with_grad: SLIPLoss(
        SIMCLRLoss(temperature), ssl_scale, with_grad
    ),
}


def create_loss(name, temperature=0.1, ssl_scale=1.0, gather_with_grad=False):
    """The loss that trains a method.

    Args:
        name: a row of LOSSES, as the method's `loss` says.
        temperature: of the SimCLR loss.
        ssl_scale: weight of the SimCLR loss in SLIP.
        gather_with_grad: see CLIPLoss.
    """
    return LOSSES[name](temperature, ssl_scale, gather_with_grad)
