"""The watchdog of a rank: notices that another rank is gone, and ends this process, too.

Silence is counted in rounds, not in seconds: a process that was itself suspended accuses nobody
when it wakes.
"""

import os
import sys
import threading
import time
from contextlib import suppress


def describe_silence(ranks, seconds):
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return f"{names} gave no sign of life for {seconds:g} s: killed, or the machine is gone"


STORE = "rank 0, or the launcher, which keeps the ranks' store,"


class Watchdog(threading.Thread):
    """Ends this process when another rank is gone: a collective would wait for it for half an hour.

    Each rank counts heartbeats in the ranks' common store, and watches those of the next rank. The
    first fault that any rank finds or reports ends all of them, with its cause on stderr. If the
    store's process is frozen, calls of the store block; a second thread waits for them to return.
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
        self.interval, self.limit = interval, limit
        self.rounds, self.patience = 0, round(limit / interval)  # rounds of silence allowed
        self.ended, self.left = threading.Event(), threading.Event()

    @classmethod
    def current(cls):
        """The watchdog of this process, or None."""
        threads = (t for t in threading.enumerate() if isinstance(t, cls) and not t.ended.is_set())
        return next(threads, None)

    def run(self):
        threading.Thread(target=self.watch_store, daemon=True).start()
        seen, silent = None, 0
        while not self.ended.is_set():
            self.rounds += 1
            try:
                self.store.set(f"heartbeat{self.rank}", str(self.rounds))
                heartbeat = self.read(f"heartbeat{self.next}")
                fault = self.read("fault")
                is_done = self.read(f"done{self.next}") is not None
            except RuntimeError:  # the store's process is gone
                fault = f"1 {STORE} is gone".encode()
            if fault:
                return self.obey(fault)
            # A rank without any heartbeat has yet to start.
            is_alive = heartbeat is None or heartbeat != seen or is_done
            silent = 0 if is_alive else silent + 1
            seen = heartbeat
            if silent > self.patience:
                self.report(describe_silence([self.next], self.limit))
            self.ended.wait(self.interval)

    def watch_store(self):
        """A thread: ends the process if a call of the store, that of `close` too, never returns."""
        seen, silent = None, 0
        while not self.left.wait(self.interval):
            silent = silent + 1 if self.rounds == seen else 0
            seen = self.rounds
            if silent > self.patience:
                cause = f"{STORE} has not answered for {self.limit:g} s"
                return self.end(1, cause)

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
        with suppress(RuntimeError):  # the others ended before
            self.store.set(f"done{self.rank}", "1")
        self.left.set()

    def obey(self, fault):
        """Ends the process, after a moment in which it may end with an error of its own."""
        if not self.ended.wait(self.interval):
            code, _, cause = fault.decode().partition(" ")
            self.end(int(code), cause)

    def end(self, code, cause):
        for thread in threading.enumerate():  # a checkpoint that is being written is still good
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(10)
        print(f"error (rank {self.rank}): stopped, as {cause}", file=sys.stderr, flush=True)
        os._exit(code)
