"""Ranks: how they meet, gather and sum, tell each other of errors, and notice one that is gone."""

import os
import re
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
from torch.nn.parallel import DistributedDataParallel

from infra.signals import Stopped
from utils import InputError, one_line


def run_script(script):
    """Calls a script; an InputError becomes one line on stderr and exit code 2."""
    try:
        with report_errors():
            script()
    except InputError as error:
        rank = f" (rank {get_rank()})" if get_rank() else ""
        print(f"error{rank}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def report_errors():
    """What ends a script within is told to the other ranks, which otherwise would wait for it."""
    try:
        yield
    except BaseException as error:
        if watchdog := Watchdog.current():
            tell_ranks(watchdog, f"rank {get_rank()}", error)
        raise
    cleanup_distributed()


def tell_ranks(watchdog, rank, error):
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


def cleanup_distributed():
    """Parts from the other ranks at a script's end."""
    if watchdog := Watchdog.current():
        watchdog.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def env_int(name, default):
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
        local_rank, gpus = env_int("LOCAL_RANK", 0), torch.cuda.device_count()
        if local_rank >= gpus:
            raise InputError(
                f"this node has {gpus} GPUs; start no more than {gpus} processes on it"
            )
        torch.cuda.set_device(local_rank)
        # Images are of one size; but which kernel wins a trial differs from start to start.
        torch.backends.cudnn.benchmark = not deterministic
    rank, world_size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
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


def is_main_process():
    return get_rank() == 0


def all_gather(rows, with_grad):
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


def broadcast_object(value):
    """Rank 0's value on every rank, where ranks might see different things on a shared disk."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def rank_zero_first(function):
    """Every rank's own function(), first on rank 0, then on each node's first rank, then elsewhere.

    What the first leaves on a disk, the others find there. An error waits until all had their turn.
    """
    is_first = env_int("LOCAL_RANK", 0) == 0
    mine = 0 if is_main_process() else 1 if is_first else 2
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


def all_gather_object(values):
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


def all_reduce(tensor):
    """Sum over all ranks, in place; no gradient."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wrap_ddp(model, device):
    """The model as the ranks train it together; itself where there is one rank."""
    if get_world_size() == 1:
        return model
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def average_gradients(model, bucket=2**25):
    """Replaces each gradient by its mean over the ranks, `bucket` numbers or more at a time."""
    if get_world_size() == 1:
        return
    waiting = []
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for i, gradient in enumerate(gradients, start=1):
        waiting.append(gradient)
        if sum(g.numel() for g in waiting) >= bucket or i == len(gradients):
            flat = torch.cat([g.flatten() for g in waiting])
            dist.all_reduce(flat)
            means = (flat / get_world_size()).split([g.numel() for g in waiting])
            for g, mean in zip(waiting, means, strict=True):
                g.copy_(mean.view_as(g))
            waiting = []


def describe_silence(ranks, seconds):
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"{names} gave no sign of life for {seconds:g} s: killed, or the machine is gone"


class Watchdog(threading.Thread):
    """Ends this process when another rank is gone: a collective would wait for it for half an hour.

    A rank beats in the ranks' common store and watches the beats of the next. The first fault that
    any rank finds, or meets itself and reports, ends all of them, with that cause on stderr.
    """

    def __init__(self, store, rank, world_size, beat=1.0, limit=40.0):
        super().__init__(daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.next = (rank + 1) % world_size
        self.beat, self.limit, self.ended = beat, limit, threading.Event()

    @classmethod
    def current(cls):
        """The watchdog of this process, or None."""
        threads = (t for t in threading.enumerate() if isinstance(t, cls) and not t.ended.is_set())
        return next(threads, None)

    def run(self):
        count, seen, changed = 0, None, time.monotonic()
        while not self.ended.wait(self.beat):
            count += 1
            try:
                self.store.set(f"beat{self.rank}", str(count))
                beats = self.read(f"beat{self.next}")
                fault = self.read("fault")
                is_done = self.read(f"done{self.next}") is not None
            except RuntimeError:  # the store's process is gone, and rank 0 or the launcher with it
                fault = b"1 rank 0, or the launcher, which keeps the ranks' store, is gone"
            if fault:
                return self.obey(fault)
            if beats != seen or is_done:
                seen, changed = beats, time.monotonic()
            elif time.monotonic() - changed > self.limit:
                self.report(describe_silence([self.next], self.limit))

    def read(self, key):
        return self.store.get(key) if self.store.check([key]) else None

    def report(self, cause, code=1):
        """Tells every rank of a fault; returns the first one that any told."""
        try:
            return self.store.compare_set("fault", "", f"{code} {cause}").decode()
        except RuntimeError:  # nobody is left to be told
            return f"{code} {cause}"

    def explain(self, cause):
        """What may be behind an error of this rank, `cause`: another's, or one that is gone."""
        silent = [] if self.read_safely("fault") else self.silent()
        return self.report(describe_silence(silent, 3 * self.beat) if silent else cause)

    def silent(self):
        """Ranks that give no sign of life for three beats."""
        others = [r for r in range(self.world_size) if r != self.rank]
        before = {r: self.read_safely(f"beat{r}") for r in others}
        time.sleep(3 * self.beat)
        return [
            r
            for r in others
            if self.read_safely(f"beat{r}") == before[r] and not self.read_safely(f"done{r}")
        ]

    def read_safely(self, key):
        try:
            return self.read(key)
        except RuntimeError:
            return None

    def close(self):
        """This rank is through, without a fault."""
        if self.ended.is_set():
            return
        self.ended.set()
        try:
            self.store.set(f"done{self.rank}", "1")
        except RuntimeError:
            return  # the others were through before

    def obey(self, fault):
        """Ends the process, after a moment in which it may end in its own words."""
        if self.ended.wait(self.beat):
            return
        code, _, cause = fault.decode().partition(" ")
        for thread in threading.enumerate():  # a checkpoint that is being written is still good
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(10)
        print(f"error (rank {self.rank}): stopped, as {cause}", file=sys.stderr, flush=True)
        os._exit(int(code))
