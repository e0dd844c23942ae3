"""torch.compile: everything is compiled in one trial at the start, on all ranks or on none."""

import os
import socket
from contextlib import ExitStack, contextmanager

import torch

from infra.distributed import all_gather_object, alone, get_rank
from infra.untrusted import first_line

BACKEND = "inductor"
LIMIT = 1024  # graphs of one function: far more than there are shapes, modes and unlike blocks
AFTERWARDS = "eager_on_recompile"  # shapes that the trial did not see are not worth a stall


def compile_modules(modules, trial, budget=None):
    """Compiles modules by torch.compile, for all that trial() does with them.

    What the trial does not do runs uncompiled later, so that nothing compiles in mid-training, when
    ranks would wait for each other. If the trial fails on a rank, all modules stay uncompiled on
    all ranks. Ranks do not wait for each other within it: sums and gathers are this rank's alone.

    Args:
        modules: compiled one by one; those that are alike share one compilation.
        trial: runs them, forward and backward.
        budget: the share of a module's activations that is kept for backward, of 0 to 1; the
            cheapest to compute are computed again. None: all.

    Returns the reasons of failures, a line for each rank that had one: [] on all ranks if none had.
    """
    for module in modules:
        module.compile(backend=BACKEND, dynamic=False)
    torch.compiler.set_stance("default")
    with compiler_options(own_cores(), budget), alone():
        reason = attempt(trial)
    reasons = all_gather_object([f"rank {get_rank()}: {reason}"] if reason else [])
    torch.compiler.set_stance("force_eager" if reasons else AFTERWARDS)
    return reasons


def attempt(trial):
    """None, or the reason of the failure of trial() in one line."""
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        error = getattr(error, "inner_exception", error)  # of a compiler's own error
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@contextmanager
def compiler_options(cores, budget):
    """Options of what is compiled within.

    They hold in this thread alone. Backward, which compiles as well, runs here instead of in
    autograd's threads of the devices.
    """
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    inductor = torch._inductor.config
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(
            torch._dynamo.config.patch(
                recompile_limit=LIMIT,
                accumulated_recompile_limit=LIMIT,
                optimize_ddp=False,  # it would split a block at the edge of a bucket
            )
        )
        stack.enter_context(
            inductor.patch(
                compile_threads=min(inductor.compile_threads or cores, cores),
                fallback_random=True,  # the random numbers of uncompiled modules
            )
        )
        if budget is not None:
            stack.enter_context(torch._functorch.config.patch(activation_memory_budget=budget))
        yield


def own_cores():
    """Cores of this process, divided by the processes of this machine that have the same ones."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = os.sched_getaffinity(0) if has_affinity else set(range(os.cpu_count() or 1))
    own = socket.gethostname(), cores
    return max(1, len(cores) // all_gather_object([own]).count(own))
