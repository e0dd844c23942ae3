"""A run's folder: saving at any update, in the background, and resuming from the newest whole file.

checkpoint.pt is the latest, checkpoint-<updates>.pt those before it, checkpoint_best.pt the best.
Each is written beside its place, flushed, verified and renamed: at any moment a whole one is there.
Rank 0 writes, one file at a time.
"""

import fcntl
import glob
import os
import shutil
import socket
import threading
import time

import torch

import utils
from infra import checkpoint, distributed
from utils import InputError

RETRIES = (1.0, 3.0)  # seconds before each further attempt at the last checkpoint
LOCK_PATIENCE = 10.0  # seconds: a process that was killed just now may not have gone yet


def copy_to_host(value, old=None):
    """A copy of nested dicts and lists of tensors in host memory; reuses the memory of `old`.

    Copies from CUDA are asynchronous: synchronize before reading them.
    """
    if isinstance(value, dict):
        old = old if isinstance(old, dict) else {}
        return {key: copy_to_host(x, old.get(key)) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(x) for x in value)
    if not torch.is_tensor(value):
        return value
    if not torch.is_tensor(old) or (old.shape, old.dtype) != (value.shape, value.dtype):
        old = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return old.copy_(value.detach(), non_blocking=True)


def lock_folder(folder):
    """The open lock file of a run's folder. Raises InputError if another process holds it."""
    try:
        file = open(os.path.join(folder, ".lock"), "a+")  # noqa: SIM115  # held until the run ends
    except OSError as error:
        raise InputError(f"output folder {folder}: {error.strerror}; choose another") from error
    patience = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() < patience:
                time.sleep(0.2)
                continue
            file.seek(0)
            raise InputError(
                f"output folder {folder}: another run writes there ({file.read().strip()}); wait "
                "for its end or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


class CheckpointManager:
    """Saves a run's state in the background and restores it."""

    def __init__(
        self, folder, parts, state, device, facts, keep_last, save_every_minutes, pretrained, info
    ):
        """
        Args:
            folder: of the checkpoints.
            parts: {key of the checkpoint: object with a state_dict}.
            state: the run.TrainState, a part of its own.
            device: of the tensors.
            facts: plain data kept beside the parts (logger.describe_run).
            keep_last: the number of checkpoints to keep.
            save_every_minutes: between two saves by the clock; 0: none.
            pretrained: digest of the checkpoint that the run began from, or None.
            info: logs a text; a fault of the writing thread goes there.
        """
        self.folder, self.latest = str(folder), os.path.join(folder, "checkpoint.pt")
        self.best = os.path.join(folder, "checkpoint_best.pt")
        self.parts, self.state, self.device = parts | {"progress": state}, state, device
        self.facts, self.pretrained, self.info = facts, pretrained, info
        self.keep_last, self.seconds = keep_last, 60 * save_every_minutes
        self.saved, self.number = time.monotonic(), None  # number: updates behind the latest
        self.lock_file = self.writer = self.copies = None
        self.is_hurried = False  # the latest save
        self.unsaved = self.fault = None  # of the latest save: its state, and why it failed
        self.absent = set()  # parts that the restored checkpoint lacks

    # Restoring

    def restore(self, other, check, fixed):
        """Restores the folder's newest whole checkpoint, or `other`; all ranks together.

        The run's own progress comes first: a requeued job names its first checkpoint again.

        Args:
            other: path of a checkpoint to begin from, or "".
            check: the flags to look at when the checkpoint does not fit, for the error.
            fixed: flags and facts that must equal those of the checkpoint.

        Returns notes for the log, [] if the run begins.
        """
        found = self.newest() if distributed.is_main_process() else None
        path, notes = distributed.broadcast_object(found)
        if not (path or other):
            return notes
        state = checkpoint.load(path or other)
        if path and state.get("pretrained") != self.pretrained:
            raise InputError(
                f"{path} began from another pretrained checkpoint; choose another output folder"
            )
        checkpoint.check_flags(state, self.facts, fixed, path or other)
        checkpoint.restore(state, path or other, self.parts, check)
        self.absent = {key for key in self.parts if not state.get(key)}
        s = self.state
        s.epoch, s.best_acc1 = state["epoch"], float(state.get("best_acc1", 0.0))
        self.restore_random(state.get("random", []), path or other)
        if path == self.latest:
            self.number = s.updates
        at = f" and {s.step} updates" if s.step else ""
        notes.append(f"resumed {path or other} after {s.epoch} epochs{at}")
        return notes + checkpoint.describe_changes(state, self.facts)

    def restore_random(self, states, path):
        """Ranks that the saved run did not have keep the random state they were seeded with."""
        try:
            if distributed.get_rank() >= len(states):
                return
            state = states[distributed.get_rank()]
            utils.set_rng_state(state, self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {path}: its random states are of another kind") from error
        self.state.random = state if self.state.step else None

    def newest(self):
        """(path of the folder's newest whole checkpoint or None, faults of the newer ones)."""
        if os.path.isdir(self.folder):
            self.lock()
        notes = []
        for path in [self.latest, *self.older()]:
            if not os.path.exists(path):
                continue
            try:
                checkpoint.load(path)
                checkpoint.check_sums(path)
                return path, notes
            except InputError as error:
                notes.append(f"warning: {error}; resuming from the one before it")
        if notes:
            raise InputError(f"no checkpoint in {self.folder} is whole, move them away: {notes[0]}")
        return None, notes

    def older(self):
        """The checkpoints before the latest, newest first."""
        return sorted(glob.glob(f"{glob.escape(self.folder)}/checkpoint-[0-9]*.pt"), reverse=True)

    def lock(self):
        """Keeps other runs out of the folder, which must exist, until `close`."""
        if distributed.is_main_process() and not self.lock_file:
            self.lock_file = lock_folder(self.folder)
            for path in [self.latest, self.best, *self.older()]:  # of a run that was killed
                utils.remove_temporaries(path, days=0)

    # Saving

    def should_save(self):
        """Whether the clock asks for a save, and the one before it is written; on rank 0."""
        is_time = self.seconds and time.monotonic() - self.saved > self.seconds
        return bool(is_time) and not (self.writer and self.writer.is_alive())

    def save(self, is_best=False, is_hurried=False):
        """Copies the run's state, all ranks together; a thread of rank 0 writes it.

        is_hurried: the file is not read again, if another one stays beside it.
        """
        states = distributed.all_gather_object([utils.get_rng_state(self.device)])
        if not distributed.is_main_process():
            return
        self.wait()
        self.is_hurried = is_hurried
        if self.unsaved and self.unsaved[1]:  # no later one makes up for the best
            self.write(*self.unsaved)
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        self.copies = copy_to_host(parts, self.copies)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        facts = {"epoch": self.state.epoch, "best_acc1": self.state.best_acc1}
        state = self.facts | facts | {"pretrained": self.pretrained, "random": states}
        self.writer = threading.Thread(target=self.write, args=(state | self.copies, is_best))
        self.writer.start()
        self.saved = time.monotonic()

    def write(self, state, is_best):
        """A fault costs this checkpoint, not the run, and leaves the old ones as they were."""
        self.try_to_write(state, is_best)
        if self.fault:
            self.info(
                f"warning: the checkpoint could not be saved ({self.fault}); training continues, "
                f"{self.describe_others()}"
            )

    def try_to_write(self, state, is_best):
        """Sets `unsaved` and `fault`, the reason, if the state cannot be written."""
        self.unsaved, self.fault = (state, is_best), None
        try:
            for part in ("state_dict", "ema"):
                for key, value in state.get(part, {}).items():
                    if value.is_floating_point() and not value.isfinite().all():
                        raise ValueError(f"{key} is not finite")
            checkpoint.save(self.latest, state, lambda path: self.verify(path, is_best))
            self.unsaved = None
            self.number = state["progress"]["updates"]
            for path in self.older()[self.keep_last - 1 :]:
                os.unlink(path)
        except Exception as error:  # PyTorch's writer raises errors of many kinds
            while not isinstance(error, OSError) and error.__context__:
                error = error.__context__
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            self.fault = reason or type(error).__name__

    def describe_others(self):
        if any(map(os.path.exists, [self.latest, *self.older()])):
            return "the one before it is whole"
        return "none has been saved yet"

    def finish(self):
        """Waits for the last checkpoint. Raises InputError, on rank 0, if no attempt can write it.

        Unlike a checkpoint before it, no later one makes up for it.
        """
        self.wait()
        for pause in RETRIES if self.unsaved else ():
            time.sleep(pause)
            self.try_to_write(*self.unsaved)
            if not self.unsaved:
                self.info("the last checkpoint is saved after all")
                return
        if self.unsaved:
            raise InputError(
                f"the last checkpoint could not be saved in {self.folder} ({self.fault}); "
                f"{self.describe_others()}; mend that, and the same command resumes from there"
            )

    def verify(self, temporary, is_best):
        """Reads the new file, copies it if it is the best, and makes way for it as the latest."""
        if not self.is_hurried or self.keep_last == 1:
            checkpoint.verify(temporary)
        if is_best:  # first: the latest names the best's accuracy
            with open(temporary, "rb") as source:
                utils.write_atomically(self.best, lambda file: shutil.copyfileobj(source, file))
        self.rotate()

    def rotate(self):
        """Keeps the latest checkpoint under the number of its updates."""
        if self.keep_last == 1 or self.number is None or not os.path.exists(self.latest):
            return
        kept = os.path.join(self.folder, f"checkpoint-{self.number:08d}.pt")
        try:
            with utils.temporary_name(kept) as name:
                os.link(self.latest, name)
                os.replace(name, kept)
        except OSError:  # a file system without hard links
            os.replace(self.latest, kept)

    def wait(self):
        """Until the writing thread has ended."""
        if self.writer:
            self.writer.join()

    def close(self):
        """At the run's end, whatever ends it."""
        self.wait()
        if self.lock_file:
            self.lock_file.close()
