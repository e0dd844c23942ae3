"""One object for a run: its state, checkpoints, log and signals."""

import copy
import dataclasses
from dataclasses import dataclass, field

import torch

from infra.distributed import all_reduce, get_world_size


class Meters:
    """Means of metrics that stay on their device until read, so that no step waits.

    `update` takes a dict of scalar tensors, equal keys every time. Neither how often it is read nor
    an interruption between (`state_dict`) changes a bit of any mean.
    """

    def __init__(self):
        self.keys, self.pending = [], []  # (keys,) of each update on this rank
        self.window, self.totals, self.steps = [], [], 0

    def update(self, metrics):
        self.keys = list(metrics)
        self.pending.append(torch.stack([value.detach().double() for value in metrics.values()]))

    def read(self):
        """Fetches what was updated since; returns the values of each update on this rank, {key:
        list}. All ranks read at once."""
        if not self.pending:
            return {key: [] for key in self.keys}
        own, self.pending = torch.stack(self.pending), []  # (updates, keys)
        for row in (all_reduce(own.clone()) / get_world_size()).tolist():
            self.window.append(row)
            totals = self.totals or [0.0] * len(row)
            self.totals = [total + value for total, value in zip(totals, row, strict=True)]
            self.steps += 1
        return dict(zip(self.keys, own.T.tolist(), strict=True))

    def means(self):
        """Over all ranks and the updates read since the last call."""
        window, self.window = self.window, []
        sums = map(sum, zip(*window, strict=True))
        return {key: total / len(window) for key, total in zip(self.keys, sums, strict=False)}

    def averages(self):
        """Over all ranks and updates that were read."""
        return {key: v / self.steps for key, v in zip(self.keys, self.totals, strict=False)}

    STATE = ("keys", "window", "totals", "steps")

    def state_dict(self):
        """What was read; to be asked for after `read`."""
        return {name: copy.copy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])


@dataclass
class TrainState:
    """Where a run is: with weights, optimizer and random states all that it goes on from."""

    epoch: int = 0  # epochs finished
    step: int = 0  # updates done of the one after these
    updates: int = 0  # of the run
    samples: int = 0  # seen in the run
    batch: int = 0  # samples of an update, of all ranks
    bad: int = 0  # samples of the epoch that had to be replaced
    skipped: int = 0  # updates of the run left out by --skip-nonfinite
    elapsed: float = 0.0  # seconds of the epoch,
    waited: float = 0.0  # and those of them spent waiting for data
    best_acc1: float = 0.0
    meters: Meters = field(default_factory=Meters)  # of the epoch
    random: dict | None = None  # this rank's random state to go on with

    def state_dict(self):
        fields = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del fields["random"]  # of all ranks, in a place of its own
        return fields | {"meters": self.meters.state_dict()}

    def load_state_dict(self, state):
        """Raises TypeError or KeyError where it is none."""
        meters, numbers = state["meters"], {k: v for k, v in state.items() if k != "meters"}
        known = {f.name: f.type for f in dataclasses.fields(self)}
        for name, value in numbers.items():
            if known[name] not in (int, float) or not isinstance(value, known[name]) or value < 0:
                raise TypeError(name)
            setattr(self, name, value)
        self.meters.load_state_dict(meters)

    def start(self, updates, batch):
        """Before an epoch of `updates` updates of `batch` samples. Where the run went on with
        another batch in mid-epoch, the updates done are counted in the new one."""
        if self.step and self.batch != batch:
            self.step = min(self.step * self.batch // batch, updates)
        elif not self.step:
            self.bad, self.elapsed, self.waited, self.meters = 0, 0.0, 0.0, Meters()
        self.batch = batch

    def advance(self, elapsed, waited):
        """After an update; seconds of the epoch so far."""
        self.step, self.updates = self.step + 1, self.updates + 1
        self.samples += self.batch
        self.elapsed, self.waited = elapsed, waited

    def finish_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0

    def speed(self):
        """Samples per second and the share of time spent waiting for data, of the epoch."""
        elapsed = max(self.elapsed, 1e-9)
        return {
            "samples_per_sec": self.step * self.batch / elapsed,
            "data_wait": self.waited / elapsed,
        }
