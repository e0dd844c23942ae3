"""Signals that end a run: noted when they come, obeyed by all ranks together between two updates.

Launchers that have a handler of their own (submitit's queues the job again, by whatever signal its
version uses) get the signal as soon as the run is saved. Knows no model, file or loader.
"""

import os
import signal
import threading
from contextlib import ExitStack

import torch
import torch.distributed as dist

NOTHING, SAVE = 0, 1  # wishes; a larger one is the number of a signal: save and stop
STOPPING = (signal.SIGTERM, signal.SIGUSR2)
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class Stopped(SystemExit):
    """Ends a script with exit code 0: a signal was obeyed."""


class SignalHandler(ExitStack):
    """Notes the signals that a run is sent; for a with statement of the main thread.

    At its end the handlers that were there before come back.
    """

    def __init__(self):
        super().__init__()
        self.signum, self.is_held, self.previous = NOTHING, False, {}

    def __enter__(self):
        # A launcher's handler shows which signal it uses, whatever its version.
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

    def agree(self, wish=NOTHING):
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
    """For a loader's worker: ignores signals to the whole job, which its parent obeys.

    A worker that SIGTERM ends would take the run with it, in mid-update. SIGTERM from its parent
    ends it: so a loader closes the workers that it no longer needs.
    """
    for signum in USER_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
