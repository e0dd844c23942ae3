"""The contrastive losses: CLIP, SimCLR and their sum, SLIP (arXiv:2112.12750, section 3).

Each takes the model's output dict and returns {"loss", ...metrics}: scalars on the model's device,
for this rank's rows against the rows of all ranks. Accuracies are in percent, without gradient.
Shapes: B local batch, N global batch, D embedding.
"""

import math

import torch
from torch import nn

from contrast import DUPLICATES, Contrast, InfoNCE, ids_of, local_labels, normalize, sigmoid_loss
from infra.distributed import all_gather
from utils import InputError, not_negative, positive


def add_loss_flags(add):
    """Adds the losses' flags, with add_argument of their group."""
    add("--ssl-scale", default=1.0, type=not_negative, help="weight of the SimCLR loss in SLIP")
    add("--ssl-temp", default=0.1, type=positive, help="temperature of the SimCLR loss")
    text = "of pairs; sigmoid is SigLIP's, always with the full gradient"
    add("--clip-loss", default="softmax", choices=CLIP_LOSSES, help=text)
    text = "at the start, of sigmoid alone: a number, by default -10; auto: ln(1 / (batch - 1))"
    add("--init-logit-bias", type=parse_bias, metavar="B", help=text)
    text = "equal captions or images of a batch: negatives, hidden, or positives"
    add("--duplicates", default="keep", choices=DUPLICATES, help=text)
    add("--gather-with-grad", action="store_true", help="full CLIP gradient on several ranks")


def parse_bias(text):
    """An argparse type: auto, or a finite number."""
    if text != "auto" and not math.isfinite(float(text)):
        raise ValueError
    return text if text == "auto" else float(text)


parse_bias.__name__ = "bias"  # argparse names it if text is neither


def add_bias(model, clip_loss, start, batch):
    """Gives a model the logit bias that a sigmoid loss begins with.

    Args:
        model: a models.Method.
        clip_loss: a row of CLIP_LOSSES.
        start: a number; None: SigLIP's, -10; "auto": the logit of one pair in `batch`.
        batch: N, the samples that the loss contrasts.

    Raises InputError for a start that the loss, or a loss that the method, has no use for.
    """
    if not CLIP_LOSSES[clip_loss].has_bias:
        if start is not None:
            raise InputError(
                f"logit bias {start}: the {clip_loss} loss has none; omit it or choose sigmoid"
            )
        return
    if "text" not in model.views:
        raise InputError(f"{clip_loss} loss: the method has no text; choose CLIP or SLIP")
    start = -math.log(max(batch - 1, 1)) if start == "auto" else start
    model.add_logit_bias(-10 if start is None else start)


class CLIPLoss(nn.Module):
    """(InfoNCE(image, texts) + InfoNCE(text, images)) / 2, at the learned temperature.

    On several ranks the archived code, and the default here, sends no gradient through the
    gathered embeddings. gather_with_grad sends it, which equals one process on the whole batch.
    """

    has_bias = False

    def __init__(self, gather_with_grad=False, duplicates="keep"):
        super().__init__()
        self.gather_with_grad = gather_with_grad
        self.contrast = InfoNCE(duplicates)

    def forward(self, outputs):
        image, text = normalize(outputs["image_embed"]), normalize(outputs["text_embed"])  # (B, D)
        scale, labels = outputs["logit_scale"].to(image.dtype), local_labels(image)
        with torch.autocast(image.device.type, enabled=False):
            images, texts = (all_gather(x, self.gather_with_grad) for x in (image, text))  # (N, D)
            ids = ids_of(outputs)
            by_image, acc, found = self.contrast(image, texts, labels, scale, **ids)
            by_text, *_ = self.contrast(text, images, labels, scale, **ids)
        loss = (by_image + by_text) / 2
        metrics = {"loss": loss, "clip_loss": loss, "clip_acc": acc}
        return metrics | ({"duplicates": found} if ids else {})

    def blocks(self):
        return self.contrast.blocks()


class SigLIPLoss(nn.Module):
    """-sum_j log sigmoid(z_ij (s x_i.y_j + b)), z_ii = 1, else -1: the mean over images x_i.

    (Zhai et al., arXiv:2303.15343.) Scale and bias are learned. Gradient flows through the gathered
    texts y_j in any case, so it equals one process on the whole batch.
    """

    has_bias = True

    def __init__(self, gather_with_grad=True, duplicates="keep"):
        super().__init__()
        self.contrast = Contrast(sigmoid_loss, duplicates)

    def forward(self, outputs):
        image, text = normalize(outputs["image_embed"]), normalize(outputs["text_embed"])  # (B, D)
        scale, bias = (outputs[key].to(image.dtype) for key in ("logit_scale", "logit_bias"))
        with torch.autocast(image.device.type, enabled=False):
            texts, ids = all_gather(text, with_grad=True), ids_of(outputs)  # (N, D)
            labels = local_labels(image)
            loss, acc, found = self.contrast(image, texts, labels, scale, bias, **ids)
        metrics = {"loss": loss, "clip_loss": loss, "clip_acc": acc}
        return metrics | ({"duplicates": found} if ids else {})

    def blocks(self):
        return self.contrast.blocks()


class SIMCLRLoss(nn.Module):
    """NT-Xent (Chen et al., 2020): each view against the other view and its own other rows.

    Gradient flows through the gathered embeddings; backward sums it over the ranks.
    """

    def __init__(self, temperature=0.1, duplicates="keep"):
        super().__init__()
        self.temperature = temperature
        self.contrast = InfoNCE(duplicates)

    def forward(self, outputs):
        a, b = normalize(outputs["aug1_embed"]), normalize(outputs["aug2_embed"])  # (B, D)
        labels, scale = local_labels(a), 1 / self.temperature
        with torch.autocast(a.device.type, enabled=False):
            all_a, all_b = all_gather(a, with_grad=True), all_gather(b, with_grad=True)  # (N, D)
            own = labels + len(all_a)  # a row itself, among the keys
            if ids := ids_of(outputs, columns=[1]):  # of the images; keys are both of their views
                ids["key_ids"] = ids["key_ids"].repeat(2, 1)
            of_a, acc, found = self.contrast(
                a, torch.cat([all_b, all_a]), labels, scale, hidden=own, **ids
            )
            of_b, *_ = self.contrast(b, torch.cat([all_a, all_b]), labels, scale, hidden=own, **ids)
        loss = (of_a + of_b) / 2
        metrics = {"loss": loss, "ssl_loss": loss, "ssl_acc": acc}
        return metrics | ({"ssl_duplicates": found} if ids else {})

    def blocks(self):
        return self.contrast.blocks()


class SLIPLoss(nn.Module):
    """clip_loss + ssl_scale * ssl_loss."""

    def __init__(self, clip_loss, ssl_loss, ssl_scale=1.0):
        super().__init__()
        self.clip_loss, self.ssl_loss, self.ssl_scale = clip_loss, ssl_loss, ssl_scale

    def forward(self, outputs):
        clip, ssl = self.clip_loss(outputs), self.ssl_loss(outputs)
        return {**clip, **ssl, "loss": clip["clip_loss"] + self.ssl_scale * ssl["ssl_loss"]}

    def blocks(self):
        return [*self.clip_loss.blocks(), *self.ssl_loss.blocks()]


CLIP_LOSSES = {"softmax": CLIPLoss, "sigmoid": SigLIPLoss}  # of pairs of image and text
LOSSES = {  # by the `loss` of a method
    "clip": lambda clip, ssl, ssl_scale: clip,
    "simclr": lambda clip, ssl, ssl_scale: ssl,
    "slip": SLIPLoss,
}


def create_loss(
    name,
    temperature=0.1,
    ssl_scale=1.0,
    gather_with_grad=False,
    clip_loss="softmax",
    duplicates="keep",
):
    """The loss that trains a method.

    Args:
        name: a row of LOSSES, as the method's `loss` says.
        temperature: of the SimCLR loss.
        ssl_scale: weight of the SimCLR loss in SLIP.
        gather_with_grad: see CLIPLoss.
        clip_loss: a row of CLIP_LOSSES.
        duplicates: a row of DUPLICATES; but for "keep" the outputs hold "ids", (B, 2), of each
            sample's caption and image.
    """
    clip = CLIP_LOSSES[clip_loss](gather_with_grad, duplicates)
    return LOSSES[name](clip, SIMCLRLoss(temperature, duplicates), ssl_scale)
