"""The watchdog that notices ranks that are gone."""

import torch.distributed as dist
from launch import start

from infra.watchdog import Watchdog

RANK = """
import os, sys, time
import torch.distributed as dist
from infra.watchdog import Watchdog
file = dist.FileStore(sys.argv[1], 3)
Watchdog(file, int(os.environ["RANK"]), 3, interval=0.1, limit=2).start()
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
    one.ended.set()


def test_a_rank_that_is_through_is_not_missed(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    zero, one = watch(store, 0, 2), watch(store, 1, 2)
    one.close()
    one.close()
    assert zero.silent() == []
    assert Watchdog.current() is None
