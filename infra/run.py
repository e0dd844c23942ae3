"""One object for a run: its state, checkpoints, log and signals, in the order that saving needs.

The epoch loop stays in each script; a Run does everything around it:

    with Run(folder, training, args, {"state_dict": model}) as run:
        run.resume(args.resume, check="--model")
        run.start()
        for epoch in run.epochs(args.epochs):
            stats = ...  # train, by run.fetch() and run.obey() for each batch; validate
            run.end_epoch(stats)
"""

import copy
import dataclasses
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from infra import distributed, logger
from infra.checkpoint_manager import CheckpointManager
from infra.signals import NOTHING, SAVE, SignalHandler
from utils import make_folder, seed_everything, set_rng_state


class Meters:
    """Means of metrics, which are copied to the CPU while the device works on.

    `update` takes a dict of scalar tensors, equal keys every time. No mean depends, in any bit, on
    how often it is read, nor on an interruption between (`state_dict`).
    """

    STATE = ("keys", "window", "totals", "steps")

    def __init__(self):
        self.keys, self.pending = [], []  # (keys,) on the CPU of each update on this rank
        self.copied = None  # the event after the latest copy from a GPU
        self.window, self.totals, self.steps = [], [], 0

    def update(self, metrics):
        self.keys = list(metrics)
        row = torch.stack([value.detach().double() for value in metrics.values()])
        self.pending.append(row.to("cpu", non_blocking=True))  # into pinned memory
        if row.is_cuda:
            self.copied = torch.cuda.Event(blocking=True)
            self.copied.record()

    def read(self):
        """Takes in the updates since the last call, on all ranks together; waits for the latest.

        Returns {key: the values of each of them on this rank}.
        """
        if not self.pending:
            return {key: [] for key in self.keys}
        if self.copied:
            self.copied.synchronize()
        own, self.pending = torch.stack(self.pending), []  # (updates, keys)
        mean = distributed.all_reduce(own.clone()) / distributed.get_world_size()
        for row in mean.tolist():
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
        """Over all ranks and all updates read."""
        return {key: v / self.steps for key, v in zip(self.keys, self.totals, strict=False)}

    def state_dict(self):
        """Of the updates read; call it after `read`."""
        return {name: copy.copy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])


@dataclass
class TrainState:
    """The place that a run is at; with weights, optimizer and random states all that it resumes."""

    epoch: int = 0  # epochs finished
    step: int = 0  # updates done of the epoch after these
    updates: int = 0  # of the run
    samples: int = 0  # seen in the run
    batch: int = 0  # samples of an update, of all ranks
    bad: int = 0  # samples of the epoch that had to be replaced
    skipped: int = 0  # updates of the run skipped because they were not finite
    elapsed: float = 0.0  # seconds of the epoch,
    waited: float = 0.0  # and those of them spent waiting for data
    best_acc1: float = 0.0
    meters: Meters = field(default_factory=Meters)  # of the epoch
    random: dict | None = None  # this rank's random state to resume in mid-epoch

    def state_dict(self):
        fields = {f.name: copy.copy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del fields["random"]  # the checkpoint has a place for those of all ranks
        return fields | {"meters": self.meters.state_dict()}

    def load_state_dict(self, state):
        """Raises TypeError or KeyError for a dict of another kind."""
        meters, numbers = state["meters"], {k: v for k, v in state.items() if k != "meters"}
        known = {f.name: f.type for f in dataclasses.fields(self)}
        for name, value in numbers.items():
            if known[name] not in (int, float) or not isinstance(value, known[name]) or value < 0:
                raise TypeError(name)
            setattr(self, name, value)
        self.meters.load_state_dict(meters)

    def start_epoch(self, updates, batch):
        """Prepares for an epoch of `updates` updates of `batch` samples.

        If the run resumes in mid-epoch with another batch, its updates are counted in the new one.
        """
        if self.step and self.batch != batch:
            self.step = min(self.step * self.batch // batch, updates)
        elif not self.step:
            self.bad, self.elapsed, self.waited, self.meters = 0, 0.0, 0.0, Meters()
        self.batch = batch

    def advance(self, elapsed, waited):
        """Counts an update; elapsed, waited: seconds of the epoch so far."""
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


class Run(ExitStack):
    """The state, checkpoints, log and signals of a training, for use in a with statement.

    Signals stop the run at once before `epochs`, as nothing is lost by it; from then on at the next
    `obey` whose `fetch` came after them, saved. Whatever ends the with block, files are closed and
    handlers restored.
    """

    def __init__(self, folder, training, args, parts, pretrained=None, **facts):
        """
        Args:
            folder: of checkpoints and log.
            training: an engine.Training; its optimizer and scaler are saved.
            args: the script's flags: seed, epochs, batch_size, keep_last, save_every_minutes,
                report_to.
            parts: {key of the checkpoint: object with a state_dict}; "state_dict" is the model.
            pretrained: digest of the checkpoint that the run began from, or None. The run only
                resumes with the same one.
            facts: further plain data to keep in checkpoint and args.json.
        """
        super().__init__()
        logger.check_writers(args.report_to)
        self.args, self.training, self.device = args, training, training.precision.device
        self.state, self.log, self.notes = TrainState(), logger.SilentLog(), []
        batch = args.batch_size * training.update_freq * distributed.get_world_size()
        self.facts = logger.describe_run(
            args, effective_batch=batch, precision=training.precision.name, **facts
        )
        parts = parts | {"optimizer": training.optimizer, "scaler": training.precision.scaler}
        self.checkpoints = CheckpointManager(
            folder,
            parts,
            self.state,
            self.device,
            self.facts,
            args.keep_last,
            args.save_every_minutes,
            pretrained,
            info=lambda text: self.log.info(text),
        )
        self.signals = SignalHandler()

    def __enter__(self):
        self.enter_context(self.signals)
        self.callback(lambda: self.log.close())
        self.callback(self.checkpoints.close)
        return super().__enter__()

    @property
    def is_new(self):
        return not self.state.updates

    def resume(self, other="", *, check, fixed=()):
        """Restores the newest whole checkpoint of the folder, or `other`, on all ranks together.

        Args:
            other: path of a checkpoint to begin from, if the folder holds none.
            check: the flags to look at when the checkpoint does not fit, for the error.
            fixed: flags and facts that must equal those of the checkpoint.
        """
        self.notes += self.checkpoints.restore(other, check, fixed)

    def start(self):
        """Locks the folder, then opens the log; nothing is written before. Logs how it resumed."""
        updates = len(self.training.schedule) // self.args.epochs  # of an epoch
        first = self.state.epoch * updates + self.state.step
        if distributed.is_main_process():
            make_folder(self.checkpoints.folder)
        self.checkpoints.lock()
        place = self.state.epoch, first
        self.log = logger.open_log(self.checkpoints.folder, *place, self.args.report_to)
        self.log.settings(self.facts)
        for note in self.notes:
            self.log.info(note)

    def epochs(self, number):
        """Yields each epoch that is left of `number`; end each by `end_epoch`."""
        self.signals.hold()
        while self.state.epoch < number:
            seed_everything(self.args.seed, self.state.epoch, distributed.get_rank())
            if self.state.random:
                set_rng_state(self.state.random, self.device)
                self.state.random = None
            yield self.state.epoch
        self.checkpoints.finish()

    def end_epoch(self, stats, is_best=False):
        """Logs the epoch's numbers, {name: number}, and saves."""
        self.log.epoch(stats | {"epoch": self.state.epoch})
        self.state.finish_epoch()
        self.checkpoints.save(is_best)

    def fetch(self, wait):
        """Waits, then begins the agreement that `obey` ends; all ranks call both in turn.

        What a rank does between the two costs the agreement no time.

        Args:
            wait: function that gets a batch, say; a signal cuts it short.

        Returns wait(), or None if a signal has come. Does no more than wait before `epochs`.
        """
        if not self.signals.is_held:
            return wait()
        value = self.signals.wait(wait)
        is_due = distributed.is_main_process() and self.checkpoints.should_save()
        self.signals.ask(SAVE if is_due else NOTHING)
        return value

    def due(self):
        """The order to obey now, the same on all ranks: NOTHING, SAVE or a signal."""
        return self.signals.agree()

    def obey(self, before_save=lambda: None, is_whole=True):
        """Saves if it is time, or stops at a signal.

        Args:
            before_save: called first if there is something to save; makes the state whole.
            is_whole: False if before_save throws work away; then only a signal is obeyed.

        Raises signals.Stopped to stop.
        """
        if not self.signals.is_held:
            return
        order = self.due()
        if order == NOTHING or (order == SAVE and not is_whole):
            return
        before_save()
        self.log.flush()
        self.checkpoints.save(is_hurried=order != SAVE)  # launchers kill soon after a signal
        if order != SAVE:
            self.stop(order)

    def poll(self, wait=lambda: None):
        """Both at once; returns wait()."""
        value = self.fetch(wait)
        self.obey()
        return value

    def stop(self, signum):
        """Ends the run at a signal, once it is saved."""
        self.checkpoints.finish()
        self.checkpoints.close()
        self.log.info(
            f"stopped by {signal.Signals(signum).name} after {self.state.epoch} epochs and "
            f"{self.state.step} updates; the same command resumes it there"
        )
        self.log.close()
        distributed.cleanup_distributed()  # a launcher's handler may not return
        self.signals.stop(signum)
