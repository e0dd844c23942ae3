"""A run's folder: saving at any update, in the background, and resuming from the newest whole file.

checkpoint.pt is the latest, checkpoint-<updates>.pt those before it, checkpoint_best.pt the best.
Each is written beside its place, flushed, verified and renamed: at any moment a whole one is there.
Rank 0 writes, one file at a time.
"""

import fcntl
import glob
import os
import shutil
import signal
import socket
import threading
import time

import torch

import utils
from infra import checkpoint, distributed
from infra.logger import SilentLog
from infra.signals import NOTHING, SAVE
from utils import InputError

LOCK_PATIENCE = 10.0  # seconds: a process that was killed just now may not have gone yet


def copy_to_host(value, old=None):
    """A copy of nested dicts and lists of tensors in host memory; takes the memory of an `old` one.

    From CUDA the copies are asynchronous: synchronize before they are read.
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
    """The open lock file of a run's folder. Raises InputError where another process holds it."""
    try:
        file = open(os.path.join(folder, ".lock"), "a+")  # noqa: SIM115  # held until the run ends
    except OSError as error:
        raise InputError(f"--output-dir {folder}: {error.strerror}; choose another") from error
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
                f"--output-dir {folder}: another run writes there ({file.read().strip()}); wait "
                "for its end or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


class CheckpointManager:
    """What saves a run, lets it go on, and stops it at a signal.

    parts: {key of the checkpoint: what has a state_dict}; "progress" is a loops.Progress. facts:
    plain data kept beside them (runlog.describe_run). pretrained: digest of the checkpoint that
    the run began from; it only goes on with the same.
    """

    def __init__(self, folder, parts, interrupts, device, args, facts, pretrained=None):
        self.folder, self.latest = str(folder), os.path.join(folder, "checkpoint.pt")
        self.parts, self.progress = parts, parts["progress"]
        self.interrupts, self.device, self.log = interrupts, device, SilentLog()
        self.facts, self.pretrained = facts, pretrained
        self.keep_last, self.seconds = args.keep_last, 60 * args.save_every_minutes
        self.saved, self.number = time.monotonic(), None  # number: updates behind the latest
        self.lock = self.writer = self.copies = None
        self.absent = set()  # parts that the checkpoint that the run goes on from has not
        interrupts.callback(self.close)

    # Going on

    def restore(self, other="", check="--model", fixed=()):
        """Goes on from the folder's newest whole checkpoint, or from `other`; all ranks together.

        fixed: flags and facts that must be those of the checkpoint. Returns what to say of it, []
        where the run begins. A requeued job names its first --resume again: the run's own progress
        comes first.
        """
        path, notes = distributed.broadcast_object(
            self.newest() if distributed.is_main_process() else None
        )
        if not (path or other):
            return notes
        state = checkpoint.load(path or other)
        if path and state.get("pretrained") != self.pretrained:
            raise InputError(
                f"{path} began from another checkpoint than --pretrained; choose another "
                "--output-dir"
            )
        checkpoint.check_flags(state, self.facts, fixed, path)
        checkpoint.restore(state, path or other, self.parts, check)
        self.absent = {key for key in self.parts if not state.get(key)}
        p = self.progress
        p.epoch, p.best_acc1 = state["epoch"], float(state.get("best_acc1", 0.0))
        self.restore_random(state.get("random", []), path or other)
        if path == self.latest:
            self.number = p.updates
        at = f" and {p.step} updates" if p.step else ""
        return [*notes, f"resumed {path or other} after {p.epoch} epochs{at}"]

    def restore_random(self, states, path):
        """On another number of ranks those that are new keep the state they were seeded with."""
        try:
            if distributed.get_rank() >= len(states):
                return
            state = states[distributed.get_rank()]
            utils.set_rng_state(state, self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {path}: its random states are of another kind") from error
        self.progress.random = state if self.progress.step else None

    def newest(self):
        """(path of the newest whole checkpoint of the folder or None, what is wrong with newer)."""
        if os.path.isdir(self.folder):
            self.lock = lock_folder(self.folder)
        notes = []
        for path in [self.latest, *self.numbered()]:
            if not os.path.exists(path):
                continue
            try:
                checkpoint.load(path)
                checkpoint.check_sums(path)
                return path, notes
            except InputError as error:
                notes.append(f"warning: {error}; going on from the one before it")
        if notes:
            raise InputError(f"no checkpoint in {self.folder} is whole, move them away: {notes[0]}")
        return None, notes

    def numbered(self):
        """The checkpoints before the latest, newest first."""
        return sorted(glob.glob(f"{glob.escape(self.folder)}/checkpoint-[0-9]*.pt"), reverse=True)

    def begin(self, log):
        """Before the first update, when the folder is there."""
        self.log = log
        if distributed.is_main_process() and not self.lock:
            self.lock = lock_folder(self.folder)

    # Saving

    def due(self):
        """What is due after this update, the same on all ranks: NOTHING, SAVE or a signal."""
        is_time = self.seconds and time.monotonic() - self.saved > self.seconds
        is_free = not (self.writer and self.writer.is_alive())
        wish = SAVE if is_time and is_free and distributed.is_main_process() else NOTHING
        return self.interrupts.agreed(wish)

    def obey(self, order):
        """Saves if that is due; at a signal raises interrupts.Stopped when it is done."""
        if order == NOTHING:
            return
        self.save()
        if order == SAVE:
            return
        self.close()
        p = self.progress
        self.log.say(
            f"stopped by {signal.Signals(order).name} after {p.epoch} epochs and {p.step} updates; "
            "the same command goes on from there"
        )
        self.log.close()
        distributed.cleanup_distributed()  # a launcher's handler may not come back
        self.interrupts.stop(order)

    def check(self):
        """For long work between updates, which all ranks do alike."""
        self.obey(self.due())

    def save(self, is_best=False):
        """Copies the run's state, all ranks together; a thread of rank 0 writes it."""
        states = distributed.all_gather_object([utils.get_rng_state(self.device)])
        if not distributed.is_main_process():
            return
        self.wait()
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        self.copies = copy_to_host(parts, self.copies)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        facts = {"epoch": self.progress.epoch, "best_acc1": self.progress.best_acc1}
        state = self.facts | facts | {"pretrained": self.pretrained, "random": states}
        self.writer = threading.Thread(target=self.write, args=(state | self.copies, is_best))
        self.writer.start()
        self.saved = time.monotonic()

    def write(self, state, is_best):
        """A fault costs this checkpoint, not the run, and leaves the old ones as they were."""
        try:
            for key, value in state["state_dict"].items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise ValueError(f"{key} is not finite")
            checkpoint.save(self.latest, state, lambda path: self.accept(path, is_best))
            self.number = state["progress"]["updates"]
            for path in self.numbered()[self.keep_last - 1 :]:
                os.unlink(path)
        except Exception as error:  # PyTorch's writer raises what it likes
            while not isinstance(error, OSError) and error.__context__:
                error = error.__context__
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            self.log.say(
                f"warning: the checkpoint could not be saved ({reason}); training goes on, the one "
                "before it is whole"
            )

    def accept(self, temporary, is_best):
        """Proves a new file and keeps the latest, the place of which it is about to take."""
        checkpoint.verify(temporary)
        if is_best:  # first: the latest says how good the best is
            best = os.path.join(self.folder, "checkpoint_best.pt")
            with open(temporary, "rb") as source:
                utils.write_atomically(best, lambda file: shutil.copyfileobj(source, file))
        if self.keep_last == 1 or self.number is None or not os.path.exists(self.latest):
            return
        kept = os.path.join(self.folder, f"checkpoint-{self.number:08d}.pt")
        try:
            if os.path.exists(f"{kept}.tmp"):
                os.unlink(f"{kept}.tmp")
            os.link(self.latest, f"{kept}.tmp")
            os.replace(f"{kept}.tmp", kept)
        except OSError:  # a file system without hard links
            os.replace(self.latest, kept)

    def wait(self):
        """Until the writer is through."""
        if self.writer:
            self.writer.join()

    def close(self):
        """At the run's end, whatever ends it."""
        self.wait()
        if self.lock:
            self.lock.close()
