"""The watchdog that notices ranks that are gone."""

import queue
import signal
import threading
import time

import pytest
import torch.distributed as dist
from launch import start

from infra.watchdog import Watchdog

RANK = """
import os, sys, time
import torch.distributed as dist
from infra.watchdog import Watchdog
store, rank, _ = next(dist.rendezvous(sys.argv[1], int(os.environ["RANK"]), 3))
watchdog = Watchdog(store.clone(), rank, 3, interval=0.1, limit=2)
watchdog.start()
print("started", flush=True)
time.sleep(float(sys.argv[2]))  # as in a collective that never ends
watchdog.close()
"""


@pytest.fixture
def watched(tmp_path):
    """Starts three ranks that only wait; the first keeps the store of env://, nobody a file's."""
    (tmp_path / "script.py").write_text(RANK)
    ranks = []

    def begin(url, seconds=60):
        ranks.extend(start(tmp_path / "script.py", [url, seconds], tmp_path / "log", 3))
        assert all(process.says("started") for process in ranks)
        return ranks

    yield begin
    for process in ranks:
        process.kill()


def assert_ended(ranks, gone, cause):
    for rank in {0, 1, 2} - {gone}:
        assert ranks[rank].wait(30) == 1
        assert f"error (rank {rank}): stopped, as {cause}\n" in ranks[rank].text()


def test_ranks_that_hang_are_ended_when_one_is_gone(watched, tmp_path):
    """Without any error of a collective, as with NCCL: the kernel simply never returns."""
    ranks = watched(f"file://{tmp_path}/store")
    ranks[1].kill()
    silence = "gave no sign of life for 2 s: killed, or the machine is gone"
    assert_ended(ranks, 1, f"rank 1 {silence}")


STORE = "rank 0, or the launcher, which keeps the ranks' store, has not answered for 2 s"


@pytest.mark.parametrize(
    "frozen, cause",
    [(0, STORE), (1, "rank 1 gave no sign of life for 2 s: killed, or the machine is gone")],
)
def test_so_they_are_when_one_is_frozen(watched, frozen, cause):
    """As when its machine has no power: nothing answers, and no connection breaks."""
    ranks = watched("env://")
    ranks[frozen].signal(signal.SIGSTOP)
    assert_ended(ranks, frozen, cause)
    assert ranks[frozen].process.is_alive()


def test_a_job_that_is_suspended_accuses_nobody(watched, tmp_path):
    """As by Slurm's suspend: all ranks wake after more than the limit."""
    ranks = watched(f"file://{tmp_path}/store", seconds=5)
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.signal(signum)
        time.sleep(2.5)
    assert [rank.wait(30) for rank in ranks] == [0, 0, 0], ranks[0].text()


class Frozen:
    """A store that does not answer."""

    def __init__(self):
        self.answer = threading.Event()

    def set(self, key, value):
        self.answer.wait()


def test_one_that_closes_does_not_wait_for_a_frozen_store(monkeypatch):
    store, ended = Frozen(), queue.Queue()
    monkeypatch.setattr(Watchdog, "end", lambda self, code, cause: ended.put((code, cause)))
    zero = Watchdog(store, 0, 1, interval=0.01, limit=0.05)
    zero.start()
    closing = threading.Thread(target=zero.close)
    closing.start()
    assert ended.get(timeout=30) == (1, STORE.replace("2 s", "0.05 s"))
    store.answer.set()
    closing.join()


def watch(store, rank, world_size, interval=0.05):
    return Watchdog(store, rank, world_size, interval=interval, limit=10)


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
    one.close()


def test_a_rank_that_is_through_is_not_missed(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    zero, one = watch(store, 0, 2), watch(store, 1, 2)
    one.close()
    one.close()
    assert zero.silent() == []
    assert Watchdog.current() is None
