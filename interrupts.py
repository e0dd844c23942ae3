"""How a run ends before its time: signals, which all ranks obey together, and ranks that are gone.

Signals are noted and obeyed between two updates; until a run holds them they stop it at once.
Launchers that have a handler of their own (submitit's queues the job again, by whatever signal its
version uses) get the signal as soon as the run is saved. Knows no model, file or loader.
"""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack

import torch
import torch.distributed as dist

NOTHING, SAVE = 0, 1  # wishes; a larger one is the number of a signal: save and stop

STOPPING = (signal.SIGTERM, signal.SIGUSR2)
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class Stopped(SystemExit):
    """Ends a script with exit code 0: a signal was obeyed."""


class Interrupts(ExitStack):
    """The signals that a run is sent; to be used in a with statement of the main thread.

    At its end the handlers that were there before come back, after what the run has given
    `callback` to do at its end.
    """

    def __init__(self):
        super().__init__()
        self.signum, self.is_held, self.previous = NOTHING, False, {}

    def __enter__(self):
        # A launcher's handler tells which signal it uses, whatever its version.
        taken = [s for s in USER_SIGNALS if callable(signal.getsignal(s))]
        for signum in {*STOPPING, *taken}:
            self.previous[signum] = signal.signal(signum, self.note)
            self.callback(signal.signal, signum, self.previous[signum])
        return super().__enter__()

    def note(self, signum, frame):
        self.signum = signum
        if not self.is_held:  # nothing to lose yet
            self.stop(signum)

    def hold(self):
        """From now on signals wait until the run asks for them."""
        self.is_held = True

    def agreed(self, wish=NOTHING):
        """The largest wish of all ranks, the same on all of them: call it on every rank alike."""
        wishes = torch.tensor(max(wish, self.signum))
        if dist.is_initialized():
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
        return wishes.item()

    def stop(self, signum):
        """Hands the signal to the handler that was there before; raises Stopped if that returns."""
        handler = self.previous.get(signum)
        if callable(handler):
            handler(signum, None)
        raise Stopped(0)


def shield_worker(_=None):
    """For a loader's worker: a signal to the whole job is its parent's affair, not its own.

    A worker that SIGTERM ends would take the run with it, in mid-update. From its parent, which so
    ends the workers that it no longer needs, it obeys the signal.
    """
    for signum in USER_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


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
