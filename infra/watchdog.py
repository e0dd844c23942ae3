"""The watchdog of a rank: notices that another rank is gone, and ends this process, too."""

import os
import sys
import threading
import time


def describe_silence(ranks, seconds):
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"{names} gave no sign of life for {seconds:g} s: killed, or the machine is gone"


class Watchdog(threading.Thread):
    """Ends this process when another rank is gone: a collective would wait for it for half an hour.

    Each rank counts heartbeats in the ranks' common store, and watches those of the next rank. The
    first fault that any rank finds or reports ends all of them, with its cause on stderr.
    """

    def __init__(self, store, rank, world_size, interval=1.0, limit=40.0):
        """
        Args:
            store: the ranks' common store, on a connection of its own.
            rank: of this process.
            world_size: the number of ranks.
            interval: seconds between heartbeats.
            limit: seconds of silence that count as the end of a rank.
        """
        super().__init__(daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.next = (rank + 1) % world_size
        self.interval, self.limit, self.ended = interval, limit, threading.Event()

    @classmethod
    def current(cls):
        """The watchdog of this process, or None."""
        threads = (t for t in threading.enumerate() if isinstance(t, cls) and not t.ended.is_set())
        return next(threads, None)

    def run(self):
        count, seen, changed = 0, None, time.monotonic()
        while not self.ended.wait(self.interval):
            count += 1
            try:
                self.store.set(f"heartbeat{self.rank}", str(count))
                heartbeat = self.read(f"heartbeat{self.next}")
                fault = self.read("fault")
                is_done = self.read(f"done{self.next}") is not None
            except RuntimeError:  # the store's process is gone, and rank 0 or the launcher with it
                fault = b"1 rank 0, or the launcher, which keeps the ranks' store, is gone"
            if fault:
                return self.obey(fault)
            if heartbeat != seen or is_done:
                seen, changed = heartbeat, time.monotonic()
            elif time.monotonic() - changed > self.limit:
                self.report(describe_silence([self.next], self.limit))

    def read(self, key):
        return self.store.get(key) if self.store.check([key]) else None

    def report(self, cause, code=1):
        """Tells every rank of a fault and the exit code; returns the first that any rank told."""
        try:
            return self.store.compare_set("fault", "", f"{code} {cause}").decode()
        except RuntimeError:  # nobody is left to be told
            return f"{code} {cause}"

    def explain(self, cause):
        """Reports this rank's error; its true cause may be another rank's, or one that is gone."""
        silent = [] if self.read_safely("fault") else self.silent()
        return self.report(describe_silence(silent, 3 * self.interval) if silent else cause)

    def silent(self):
        """Ranks that give no sign of life for three heartbeats."""
        others = [r for r in range(self.world_size) if r != self.rank]
        before = {r: self.read_safely(f"heartbeat{r}") for r in others}
        time.sleep(3 * self.interval)
        return [
            r
            for r in others
            if self.read_safely(f"heartbeat{r}") == before[r] and not self.read_safely(f"done{r}")
        ]

    def read_safely(self, key):
        try:
            return self.read(key)
        except RuntimeError:
            return None

    def close(self):
        """This rank has ended without a fault."""
        if self.ended.is_set():
            return
        self.ended.set()
        try:
            self.store.set(f"done{self.rank}", "1")
        except RuntimeError:
            return  # the others ended before

    def obey(self, fault):
        """Ends the process, after a moment in which it may end with an error of its own."""
        if self.ended.wait(self.interval):
            return
        code, _, cause = fault.decode().partition(" ")
        for thread in threading.enumerate():  # a checkpoint that is being written is still good
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(10)
        print(f"error (rank {self.rank}): stopped, as {cause}", file=sys.stderr, flush=True)
        os._exit(int(code))
