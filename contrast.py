"""The similarity matrix of queries and keys, by rows: their losses, and duplicates among the keys.

Shapes: B local batch, N global batch, R rows of the matrix, K keys, D embedding, C ids of a sample.
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


def ids_of(outputs, columns=slice(None)):
    """Ids of this rank's samples and of all, (B, C) and (N, C), by name; {} if there are none."""
    if "ids" not in outputs:
        return {}
    ids = outputs["ids"][:, columns]
    return {"ids": ids, "key_ids": all_gather(ids, with_grad=False)}


def extra_views(duplicates, batch_size=0, device="cpu"):
    """{view: zeros} of a batch beside the method's views: ids, if duplicates are looked for."""
    if not DUPLICATES[duplicates]:
        return {}
    return {"ids": torch.zeros(batch_size, 2, dtype=torch.long, device=device)}


def cross_entropy(logits, labels, positives=None):
    """-log softmax at the label, or its mean over the row's `positives`; summed over the rows."""
    if positives is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    log_p = logits.log_softmax(-1).masked_fill(~positives, 0)
    return -(log_p.sum(-1) / positives.sum(-1)).sum()


def sigmoid_loss(logits, labels, positives=None):
    """-log sigmoid(z logits), summed; z is 1 at the label or the `positives`, elsewhere -1."""
    if positives is None:
        positives = is_label(logits, labels)
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum()


def is_label(logits, labels):
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


DUPLICATES = {  # (logits, a row's duplicates, these and the label) -> (logits, positives or None)
    "keep": None,  # as negatives
    "mask": lambda logits, others, alike: (logits.masked_fill(others, -torch.inf), None),
    "share": lambda logits, others, alike: (logits, alike),
}


class RowLoss(nn.Module):
    """The summed loss of some rows of a similarity matrix, and the number of hits.

    Args:
        loss: cross_entropy or sigmoid_loss.
        duplicates: a row of DUPLICATES, for keys that have an id of the query.
    """

    def __init__(self, loss=cross_entropy, duplicates="keep"):
        super().__init__()
        self.loss, self.treat = loss, DUPLICATES[duplicates]

    def forward(self, queries, keys, labels, scale, bias=None, hidden=None, ids=None, key_ids=None):
        """
        Args:
            queries: (R, D) unit rows.
            keys: (K, D) unit rows.
            labels: (R,) the key that matches each query.
            scale: the inverse temperature.
            bias: of the logits, or None.
            hidden: (R,) a key that each query must not see, or None.
            ids, key_ids: (R, C), (K, C): a pair with an equal id, in one column, is a duplicate.

        Returns (loss, hits, rows with a duplicate).
        """
        logits, positives, found = scale * queries @ keys.T, None, 0  # (R, K)
        if bias is not None:
            logits = logits + bias
        if hidden is not None:
            logits = logits.scatter(1, hidden[:, None], -torch.inf)
        if self.treat:
            alike = (ids[:, None] == key_ids).any(-1)  # (R, K)
            if hidden is not None:
                alike = alike.scatter(1, hidden[:, None], False)
            others = alike & ~is_label(logits, labels)
            logits, positives = self.treat(logits, others, alike)
            found = others.any(-1).sum()
        best = logits.detach().argmax(-1)
        hits = best == labels if positives is None else positives.gather(1, best[:, None])
        return self.loss(logits, labels, positives), hits.sum(), found


class Contrast(nn.Module):
    """The mean loss of queries among keys; accuracy and queries with a duplicate, in percent.

    ROWS rows of the matrix at a time, recomputed in backward: memory grows with the number of keys,
    not with its square. Takes the arguments of RowLoss.
    """

    def __init__(self, loss, duplicates="keep"):
        super().__init__()
        self.rows = RowLoss(loss, duplicates)

    def forward(self, queries, keys, labels, scale, bias=None, hidden=None, ids=None, key_ids=None):
        sums = 0, 0, 0
        for start in range(0, len(queries), ROWS):
            part = slice(start, start + ROWS)
            own = (x if x is None else x[part] for x in (hidden, ids))
            arguments = queries[part], keys, labels[part], scale, bias, *own, key_ids
            values = checkpoint(
                self.rows, *arguments, use_reentrant=False, preserve_rng_state=False
            )
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        total, hits, found = sums
        return total / len(queries), 100 * hits / len(queries), 100 * found / len(queries)

    def blocks(self):
        """The modules to compile."""
        return [self.rows]


class InfoNCE(Contrast):
    """-log(exp(s q.k+) / sum_k exp(s q.k)), the mean over queries q (van den Oord et al., 2018)."""

    def __init__(self, duplicates="keep"):
        super().__init__(cross_entropy, duplicates)
