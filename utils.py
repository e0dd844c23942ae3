"""What every script shares: user errors, files, ranks and gathers, schedules, meters.

Nothing here knows about models, losses or data. Shapes: N global batch, B local batch.
"""

import argparse
import copy
import errno
import json
import math
import os
import random
import re
import stat
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad

from interrupts import Stopped, Watchdog


class InputError(Exception):
    """The user's input is at fault: one line with what, which value, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Every script's: flags are spelled out, help shows defaults, an error is an InputError."""

    def __init__(self, prog=None, description=None):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, None, description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def number(kind, low, below=math.inf):
    """An argparse type: an int or float of at least `low` and less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be {low} or more{limit}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where text is no number
    return parse


natural = number(int, 0)
positive_int = number(int, 1)
positive = number(float, 1e-12)
not_negative = number(float, 0.0)


def run(script):
    """Calls a script; an InputError becomes one line on stderr and exit code 2."""
    try:
        with reported():
            script()
    except InputError as error:
        rank = f" (rank {get_rank()})" if get_rank() else ""
        print(f"error{rank}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def one_line(error):
    # From a loader's worker the text comes after its traceback.
    return " ".join(str(error).split("utils.InputError: ")[-1].split())


@contextmanager
def reported():
    """What ends a script within is told to the other ranks, which otherwise would wait for it."""
    try:
        yield
    except BaseException as error:
        if watchdog := Watchdog.current():
            tell(watchdog, f"rank {get_rank()}", error)
        raise
    leave()


def tell(watchdog, rank, error):
    """Reports what ended this rank, and says what ended the others where that came first."""
    if isinstance(error, Stopped):
        watchdog.report(f"{rank} was stopped by a signal", 0)
    elif isinstance(error, InputError):
        watchdog.report(f"{rank} found: {one_line(error)}", 2)
    else:
        own = f"{rank} failed: {type(error).__name__}: {one_line(error)}"
        cause = watchdog.explain(own).partition(" ")[2]
        if cause != own:
            print(f"error ({rank}): stopped, as {cause}", file=sys.stderr, flush=True)


def leave():
    """Parts from the other ranks at a script's end."""
    if watchdog := Watchdog.current():
        watchdog.close()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Files


def regular_file(path, flags):
    """The opener, for open(), of strangers' files: a pipe or a device might never come to its end.

    Raises OSError for these, and for a folder.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # no waiting for a pipe's writer
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def read_json(path, what):
    """The parsed JSON file; `what` names it in errors. Raises InputError if absent or malformed."""
    try:
        with open(path, encoding="utf-8", opener=regular_file) as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{what} {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} is not valid JSON: {error}") from error


def read_table(path, what):
    """The object in a JSON file, as a dict."""
    table = read_json(path, what)
    if not isinstance(table, dict):
        raise InputError(f"{what} {path} is no JSON object of named entries; check the file")
    return table


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {path}: {error.strerror}; choose another") from error
    return Path(path)


def write_atomically(path, write, prove=lambda path: None):
    """Calls write(file) on a binary file beside `path`, flushes it to disk, then renames it.

    prove: called with the path of the new file before it takes the place of the old one.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        prove(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def update_json(path, entries):
    """Adds entries to the object in a JSON file, which need not be there yet."""
    old = read_json(path, "results") if os.path.exists(path) else {}
    write_json(path, {**(old if isinstance(old, dict) else {}), **entries})


# ---------------------------------------------------------------------------------------------
# Ranks and gathers


def environment_number(name, default):
    """What a launcher left in the environment, RANK for example, as an int of 0 or more."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{name}={text!r} in the environment is no number; unset it or correct it")
    return int(text)


def init_distributed(device="auto", dist_url="env://", deterministic=False):
    """Joins the ranks that a launcher (torchrun, submitit) started and returns this rank's device.

    device: auto (CUDA if there is one), cuda or cpu. Reads RANK, WORLD_SIZE and LOCAL_RANK; without
    them, or with one rank, no process group is made. NCCL serves CUDA, gloo the CPU.
    deterministic: PyTorch takes algorithms that give the same bits every time, or says that for an
    operation there is none.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if device == "cuda":
        local_rank, gpus = environment_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local_rank >= gpus:
            raise InputError(
                f"this node has {gpus} GPUs; start no more than {gpus} processes on it"
            )
        torch.cuda.set_device(local_rank)
        # Images are of one size; but which kernel wins a trial differs from start to start.
        torch.backends.cudnn.benchmark = not deterministic
    rank, world_size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    if rank >= world_size:
        raise InputError(f"RANK={rank} is none of WORLD_SIZE={world_size} ranks; start by torchrun")
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        # Converting the metadata of 15 million pairs may take ten minutes, while the others wait.
        timeout = timedelta(minutes=30)
        try:
            meeting = dist.rendezvous(dist_url, rank, world_size, timeout=timeout)
            store, rank, world_size = next(meeting)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"the ranks cannot meet by --dist-url {dist_url}: {reason}; correct it, or start "
                "by torchrun"
            ) from error
        # torchrun's store outlives the ranks that it starts again: what those before left misleads.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        ranks = dist.PrefixStore(f"ranks{attempt}", store)
        dist.init_process_group(
            backend, store=ranks, timeout=timeout, world_size=world_size, rank=rank
        )
        # A connection of its own: the other's blocks while ranks wait for each other.
        own = dist.PrefixStore(f"watchdog{attempt}", store.clone())
        Watchdog(own, rank, world_size).start()
    return torch.device(device)


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return get_rank() == 0


def gather(rows, with_grad):
    """The rows of all ranks in rank order: (B, D) -> (N, D).

    with_grad: backward sums the gradients that all ranks have for a row; otherwise the result
    carries no gradient, not even to this rank's own rows. On one rank it is `rows` itself.
    """
    if get_world_size() == 1:
        return rows
    if with_grad:
        return torch.cat(dist_grad.all_gather(rows))
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    return torch.cat(gathered)


def from_main(value):
    """Rank 0's value on every rank, where ranks might see different things on a shared disk."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def in_turns(function):
    """Every rank's own function(), first on rank 0, then on each node's first rank, then elsewhere.

    What the first leaves on a disk, the others find there. An error waits until all had their turn.
    """
    is_first = environment_number("LOCAL_RANK", 0) == 0
    mine = 0 if is_main() else 1 if is_first else 2
    result = error = None
    for turn in range(3):
        if turn == mine:
            try:
                result = function()
            except InputError as raised:
                error = raised
        if get_world_size() > 1:
            dist.barrier()
    if error:
        raise error
    return result


def gather_objects(values):
    """The lists of all ranks, one after another."""
    if get_world_size() == 1:
        return values
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def broadcast_buffers(model):
    """Gives every rank the buffers of rank 0: batch norms of towers count on their own rank."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def reduce_sum(tensor):
    """Sum over all ranks, in place; no gradient."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------
# Optimization


def seed_everything(*numbers):
    """Seeds Python, NumPy and PyTorch with one number made from `numbers` (seed, epoch, rank)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


CPU = torch.device("cpu")


def random_state(device=CPU):
    """The random states of Python, NumPy and PyTorch, as plain data that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state()
    keys = torch.from_numpy(keys.astype(np.int64))  # unsigned tensors cannot be pickled
    state = {"python": random.getstate(), "numpy": (name, keys, *rest)}
    state["torch"] = torch.get_rng_state()
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state, device=CPU):
    """Goes back to a random_state; that of CUDA only where there is one."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(seed):
    """Python, NumPy and PyTorch (CPU) draw from `seed` within, and go on as before after it."""
    state = random_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state)


def cosine_scheduler(
    base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0.0
):
    """One value per update, (epochs * niter_per_ep,): linear warm-up, then half a cosine.

    Warm-up ends on base_value at its last update; the cosine starts there and would reach
    final_value one update after the last. Raises InputError if warm-up outlasts training.
    """
    if warmup_epochs > epochs:
        raise InputError(f"--warmup-epochs {warmup_epochs} exceeds --epochs {epochs}; lower it")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    steps = (epochs - warmup_epochs) * niter_per_ep
    phase = np.pi * np.arange(steps) / max(steps, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(phase))
    return np.concatenate([warmup, cosine])


def param_groups(model, weight_decay):
    """Weight decay for tensors of two or more dimensions; none for biases, norms, logit_scale.

    The order (decayed first) is the archived code's, so that its optimizer states load.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


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
        for row in (reduce_sum(own.clone()) / get_world_size()).tolist():
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
