"""Ranks: how they meet, gather and sum, take turns, and learn of each other's errors.

Shapes: B rows of this rank, N rows of all ranks, D columns.
"""

import inspect
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from infra import network
from infra.faults import machine_faults
from infra.signals import Stopped
from infra.streams import tolerant_streams
from infra.watchdog import Watchdog
from utils import InputError, one_line

# Their names since torch 2.14, and before.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
KEEP_BUFFERS = {"broadcast_buffers": False}
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    KEEP_BUFFERS = {"forward_sync_buffers": False}

# Work that one rank does while the others wait; what may take longer has turns, as below.
PATIENCE = timedelta(minutes=30)


# ---------------------------------------------------------------------------------------------
# Scripts and their errors


def run_script(script):
    """Calls a script; an InputError becomes one line on stderr and exit code 2."""
    with tolerant_streams():
        try:
            with report_errors():
                script()
        except InputError as error:
            rank = f" (rank {get_rank()})" if get_rank() else ""
            print(f"error{rank}: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise Stopped(signal.SIGINT) from None


@contextmanager
def report_errors():
    """Tells the other ranks, which would wait for this one, of an error that ends it."""
    try:
        with machine_faults():
            yield
    except BaseException as error:
        if watchdog := Watchdog.current():
            report_error(watchdog, f"rank {watchdog.rank}", error)
        raise
    cleanup_distributed()


def report_error(watchdog, rank, error):
    """Reports the end of this rank; if another rank's end came first, says so on stderr."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        watchdog.report(f"{rank} was stopped by a signal", getattr(error, "code", 130))
    elif isinstance(error, InputError):
        watchdog.report(f"{rank} found: {one_line(error)}", 2)
    else:
        own = f"{rank} failed: {type(error).__name__}: {one_line(error)}"
        cause = watchdog.explain(own).partition(" ")[2]
        if cause != own:
            print(f"error ({rank}): stopped, as {cause}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Joining and leaving


def env_int(name, default):
    """A number of 0 or more that a launcher left in the environment, RANK for example."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{name}={text!r} in the environment is no number; unset it or correct it")
    return int(text)


def init_distributed(device="auto", dist_url="env://", deterministic=False):
    """Joins the ranks that a launcher (torchrun, submitit) started.

    RANK, WORLD_SIZE and LOCAL_RANK are read from the environment. Without them, or with one rank,
    no process group is made. NCCL serves CUDA, gloo the CPU.

    Args:
        device: auto (CUDA if there is one), cuda or cpu.
        dist_url: the address where the ranks meet.
        deterministic: PyTorch takes algorithms that give the same bits every time, and raises an
            error for an operation that has none.

    Returns this rank's torch.device.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    device = choose_device(device, deterministic)
    rank, world_size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    if rank >= world_size:
        raise InputError(f"RANK={rank} is none of WORLD_SIZE={world_size} ranks; start by torchrun")
    if world_size > 1:
        join_ranks(dist_url, rank, world_size, device)
    return device


def choose_device(name, deterministic):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("device cuda: this machine has no usable CUDA device; use cpu")
        local_rank, gpus = env_int("LOCAL_RANK", 0), torch.cuda.device_count()
        if gpus == 1:
            local_rank = 0  # a launcher gave each rank one of its own; check_gpus compares them
        if local_rank >= gpus:
            raise InputError(
                f"this node has {gpus} GPUs; start no more than {gpus} processes on it"
            )
        torch.cuda.set_device(local_rank)
        # Images are of one size; but the kernel that wins a trial differs from start to start.
        torch.backends.cudnn.benchmark = not deterministic
    return torch.device(name)


def join_ranks(dist_url, rank, world_size, device):
    """Makes the process group, and starts this rank's watchdog."""
    try:
        store, rank, world_size = next(
            dist.rendezvous(dist_url, rank, world_size, timeout=PATIENCE)
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the ranks cannot meet at {dist_url}: {reason}; correct the address, or start by "
            "torchrun"
        ) from error
    # torchrun's store outlives the ranks that it starts again: older entries would mislead them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A connection of its own: the other one blocks while ranks wait for each other.
    own = dist.PrefixStore(f"watchdog{attempt}", store.clone())
    Watchdog(own, rank, world_size).start()
    store = dist.PrefixStore(f"ranks{attempt}", store)
    if host := network.meeting_host(dist_url):
        interface = network.choose_interface(host, rank, world_size, store)
        if interface:
            os.environ.setdefault(network.VARIABLE, interface)
    with network.gloo_faults():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            timeout=PATIENCE,
            world_size=world_size,
            rank=rank,
        )
    if device.type == "cuda":
        check_gpus()


def check_gpus():
    """Raises InputError, on every rank, if two ranks have one GPU."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    owners = {}
    for rank, uuid in enumerate(all_gather_object([str(gpu.uuid)])):
        if uuid in owners:
            raise InputError(
                f"ranks {owners[uuid]} and {rank} have the same GPU {uuid}; start no more "
                "processes on a machine than it has GPUs, or show each a GPU of its own"
            )
        owners[uuid] = rank


def cleanup_distributed():
    """Leaves the other ranks at a script's end."""
    if watchdog := Watchdog.current():
        watchdog.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


# ---------------------------------------------------------------------------------------------
# Tensors of all ranks


class AllGather(torch.autograd.Function):
    """(B, D) -> (N, D) in rank order; backward sums the gradients that all ranks have for a row."""

    @staticmethod
    def forward(ctx, rows):
        return gather_rows(rows)

    @staticmethod
    def backward(ctx, grad):
        if grad.is_cuda and not is_alone:
            own = grad.new_empty(len(grad) // get_world_size(), *grad.shape[1:])
            reduce_scatter_single(own, grad.contiguous())
            return own
        # gloo has no reduce_scatter
        total = all_reduce(grad.clone(memory_format=torch.contiguous_format))
        return total.chunk(get_world_size())[get_rank()]


class AllReduce(torch.autograd.Function):
    """The sum over all ranks; backward sums the gradients that all ranks have for it."""

    @staticmethod
    def forward(ctx, tensor):
        return all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(memory_format=torch.contiguous_format))


is_alone = False


@contextmanager
def alone():
    """Within, sums and gathers of tensors take this rank's values in the place of the others'.

    Shapes are those of all ranks, but no rank waits for another: the code may fail on one of them.
    """
    global is_alone
    is_alone = True
    try:
        yield
    finally:
        is_alone = False


def gather_rows(rows):
    if is_alone:
        return torch.cat([rows] * get_world_size())
    gathered = rows.new_empty(len(rows) * get_world_size(), *rows.shape[1:])
    all_gather_single(gathered, rows.contiguous())
    return gathered


def all_gather(rows, with_grad):
    """The rows of all ranks in rank order: (B, D) -> (N, D).

    with_grad: backward sums the gradients that all ranks have for a row; otherwise the result
    carries no gradient, not even to this rank's own rows. On one rank it is `rows` itself.
    """
    if get_world_size() == 1:
        return rows
    return AllGather.apply(rows) if with_grad else gather_rows(rows.detach())


def all_reduce(tensor):
    """The sum over all ranks, in place; no gradient."""
    if get_world_size() > 1 and not is_alone:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_with_grad(tensor):
    return AllReduce.apply(tensor)


def broadcast_buffers(model):
    """Gives every rank the buffers of rank 0: batch norms of towers count on their own rank."""
    broadcast(model.buffers())


def broadcast_model(model):
    """Gives every rank the weights and buffers of rank 0, whatever it built."""
    broadcast([*model.parameters(), *model.buffers()])


def broadcast(tensors):
    if get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def wrap_ddp(model, device, reduce_dtype=None):
    """The model as the ranks train it together; itself if there is one rank.

    Buffers stay those of each rank, see broadcast_buffers. reduce_dtype: torch.bfloat16 to sum
    gradients in it, half the traffic; None: in their own.
    """
    if get_world_size() == 1:
        return model
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **KEEP_BUFFERS)
    if reduce_dtype == torch.bfloat16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def average_gradients(model, reduce_dtype=None, bucket=2**25):
    """Replaces each gradient by its mean over the ranks, `bucket` numbers or more at a time.

    reduce_dtype: of the sums; None: that of the gradients.
    """
    if get_world_size() == 1:
        return
    waiting = []
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for i, gradient in enumerate(gradients, start=1):
        waiting.append(gradient)
        if sum(g.numel() for g in waiting) >= bucket or i == len(gradients):
            flat = torch.cat([g.flatten() for g in waiting]).to(dtype=reduce_dtype)
            flat = all_reduce(flat)
            means = (flat / get_world_size()).split([g.numel() for g in waiting])
            for g, mean in zip(waiting, means, strict=True):
                g.copy_(mean.view_as(g))
            waiting = []


# ---------------------------------------------------------------------------------------------
# Objects of all ranks, and turns


def broadcast_object(value):
    """Rank 0's value on every rank: ranks might see different things on a shared disk."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_object(values):
    """The lists of all ranks, one after another."""
    if get_world_size() == 1:
        return values
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def barrier():
    if get_world_size() > 1:
        dist.barrier()


def end_turn():
    """A barrier without a limit of time: the watchdog ends the wait for a rank that is gone."""
    if not (watchdog := Watchdog.current()):
        return barrier()
    # Nobody comes to the next barrier before all have come to this one.
    met, pause = watchdog.store.add("turns", 1), 0.01
    everyone = -(-met // get_world_size()) * get_world_size()
    while watchdog.store.add("turns", 0) < everyone:
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def rank_zero_first(function):
    """Every rank's own function(), first on rank 0, then on each node's first rank, then elsewhere.

    The later ranks find on the disk the files that the first one wrote, however long that takes: an
    index of ten thousand shards takes hours. An error is raised when all ranks had their turn.
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
        end_turn()
    if error:
        raise error
    return result
