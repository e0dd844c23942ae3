"""Signals, the shield of loader workers, and the watchdog that notices ranks that are gone."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from launch import REPOSITORY, start

from infra import signals
from infra.distributed import Watchdog
from infra.signals import NOTHING, SAVE, SignalHandler, Stopped


def test_signals_are_noted_until_asked_for_and_handlers_come_back():
    before = [signal.getsignal(s) for s in signals.STOPPING]
    with SignalHandler() as held:
        held.hold()
        assert held.agreed() == NOTHING and held.agreed(SAVE) == SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        assert held.agreed() == held.agreed(SAVE) == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            held.stop(signal.SIGTERM)
    assert stopped.value.code == 0
    assert [signal.getsignal(s) for s in signals.STOPPING] == before


def test_before_a_run_holds_them_signals_stop_at_once():
    with SignalHandler(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_launchers_handler_gets_its_signal_when_the_run_is_saved(signum):
    """Whichever signal the launcher uses; a signal that is nobody's stays as it was."""
    calls = []
    before = signal.signal(signum, lambda *args: calls.append(args[0]))
    try:
        with SignalHandler() as held:
            held.hold()
            assert callable(signal.getsignal(signal.SIGUSR1)) == (signum == signal.SIGUSR1)
            os.kill(os.getpid(), signum)
            assert held.agreed() == signum and not calls
            with pytest.raises(Stopped):
                held.stop(held.agreed())
        assert calls == [signum]
    finally:
        signal.signal(signum, before)


WORKER = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
from infra import signals
child = os.fork()
if not child:
    signals.shield_worker()
    time.sleep(30)
    os._exit(7)
time.sleep(0.3)
stranger = os.fork()
if not stranger:
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(child, signum)
    os._exit(0)
os.waitpid(stranger, 0)
time.sleep(0.3)
assert os.waitpid(child, os.WNOHANG) == (0, 0), "a stranger's signal ended the worker"
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("shielded")
"""


def test_only_its_parent_ends_a_worker():
    code = WORKER.format(repository=str(REPOSITORY))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "shielded\n", run.stderr


RANK = """
import os, sys, time
import torch.distributed as dist
from infra.distributed import Watchdog
file = dist.FileStore(sys.argv[1], 3)
Watchdog(file, int(os.environ["RANK"]), 3, beat=0.1, limit=2).start()
print("started", flush=True)
time.sleep(60)  # as in a collective that never ends
"""


def test_ranks_that_hang_are_ended_when_one_is_gone(tmp_path):
    """Without any error of a collective, as with NCCL: the kernel simply never returns."""
    (tmp_path / "script.py").write_text(RANK)
    ranks = start(tmp_path / "script.py", [tmp_path / "store"], tmp_path / "log", 3)
    assert all(process.says("started") for process in ranks)
    ranks[1].kill()
    for rank in (0, 2):
        assert ranks[rank].wait(30) == 1
        error = f"error (rank {rank}): stopped, as rank 1 gave no sign of life for 2 s"
        assert error in ranks[rank].text()


def watch(store, rank, world_size, beat=0.05):
    return Watchdog(store, rank, world_size, beat=beat, limit=10)


def test_the_first_fault_counts_and_the_silent_are_named(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 3)
    zero, one = watch(store, 0, 3), watch(dist.FileStore(str(tmp_path / "store"), 3), 1, 3)
    one.start()
    one_is_alive = zero.silent()
    assert one_is_alive == [2]
    assert (
        zero.explain("own fault")
        == "1 rank 2 gave no sign of life for 0.15 s: killed, or the machine is gone"
    )
    assert zero.report("another", 2) == zero.explain("a third")  # the first one counts
    one.ended.set()


def test_a_rank_that_is_through_is_not_missed(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    zero, one = watch(store, 0, 2), watch(store, 1, 2)
    one.close()
    one.close()
    assert zero.silent() == []
    assert Watchdog.current() is None
