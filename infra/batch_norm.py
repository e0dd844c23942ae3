"""Batch norm over all ranks.

Shapes: B rows of this rank, W columns.
"""

import torch
from torch import nn

from infra.distributed import all_reduce_with_grad, get_world_size


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch norm whose training statistics span all ranks, on CUDA and on the CPU alike.

    (torch.nn.SyncBatchNorm refuses CPU tensors.) On one rank it is nn.BatchNorm1d.
    """

    def forward(self, x):  # (B, W)
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            full = x if x.dtype == torch.float64 else x.float()
            count = len(full) * get_world_size()
            mean = all_reduce_with_grad(full.sum(0)) / count
            centred = full - mean
            var = all_reduce_with_grad(centred.square().sum(0)) / count
            with torch.no_grad():  # running_var is the unbiased estimate, as in nn.BatchNorm1d
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
            return (centred * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)
