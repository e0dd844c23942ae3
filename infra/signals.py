"""Signals that end a run: noted when they come, obeyed by all ranks together between two updates.

A rank that waits for a batch gives up two seconds after a signal: stuck storage may never answer.
Launchers that have a handler of their own (submitit's queues the job again, by whatever signal its
version uses) get the signal as soon as the run is saved. Knows no model, file or loader.
"""

import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack

import torch
import torch.distributed as dist

from utils import InputError

NOTHING, SAVE = -1, 0  # wishes; a larger one is the number of a signal: save and stop
STOPPING = (signal.SIGTERM, signal.SIGUSR2)
TERMINAL = (signal.SIGINT, signal.SIGHUP)  # nohup and shells' background have them ignored
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
SAME = 1.0  # seconds within which two signals are one: launchers pass on what all ranks get
SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # bytes of multiprocessing's sockets
PATIENCE = 2.0  # seconds after a signal in which a batch may still arrive


class Stopped(SystemExit):
    """Ends a script because a signal was obeyed.

    The exit code is 0; after Ctrl-C or a hang-up that of a shell, so that its script ends, too.
    """

    def __init__(self, signum):
        super().__init__(128 + signum if signum in TERMINAL else 0)


class Interrupted(BaseException):
    """Raised in a wait that a signal cuts short."""


class SignalHandler(ExitStack):
    """Notes the signals that a run is sent; for a with statement of the main thread.

    At its end the handlers that were there before come back.
    """

    def __init__(self):
        super().__init__()
        self.signum, self.previous = NOTHING, {}
        self.wishes = self.work = None  # of the agreement that `ask` began
        self.is_held = self.is_waiting = self.is_overdue = self.is_stopping = False

    def __enter__(self):
        # A launcher's handler shows which signal it uses, whatever its version.
        taken = [s for s in USER_SIGNALS if callable(signal.getsignal(s))]
        heard = [s for s in TERMINAL if signal.getsignal(s) != signal.SIG_IGN]
        for signum in {*STOPPING, *taken, *heard}:
            self.previous[signum] = signal.signal(signum, self.note)
            self.callback(signal.signal, signum, self.previous[signum])
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        listener = threading.Thread(target=self.listen, args=(reader,), daemon=True)
        listener.start()
        self.callback(listener.join)
        self.callback(os.write, self.writer, b"\0")
        self.callback(signal.set_wakeup_fd, wakeup)
        return super().__enter__()

    def note(self, signum, frame):
        self.signum = signum
        if not self.is_held:  # nothing to lose yet
            self.stop(signum)
        if self.is_waiting and self.is_overdue:
            self.is_waiting = False
            raise Interrupted

    def listen(self, reader):
        """A thread: ends a wait that outlasts a signal, and the process at a second signal.

        `note` would not hear the second while the main thread waits in a collective. What a run
        that is being saved gets from its launcher does not end it; another Ctrl-C does.
        """
        first, noted, is_own = None, None, False
        while True:
            is_patient = noted and not self.is_overdue
            if not select.select([reader], [], [], PATIENCE if is_patient else None)[0]:
                self.is_overdue, is_own = True, self.is_waiting
                if is_own:  # `note` breaks the wait
                    signal.pthread_kill(threading.main_thread().ident, first)
                continue
            signum, now = os.read(reader, 1)[0], time.monotonic()
            if not signum:
                break
            if signum not in self.previous:
                continue
            if not noted:
                first, noted = signum, now
            elif is_own and signum == first:
                is_own = False
            elif now - noted > SAME and (signum == signal.SIGINT or not self.is_stopping):
                text = f"ended at once by a second signal, {signal.Signals(signum).name}\n"
                sys.stderr.write(text)
                os._exit(128 + signum)
        os.close(reader)
        os.close(self.writer)

    def hold(self):
        """From now on signals wait until the run asks for them."""
        self.is_held = True

    def wait(self, function):
        """function(); None if a signal has come, or comes meanwhile and nothing else does."""
        try:
            self.is_waiting = True
            try:
                return function() if self.signum == NOTHING else None
            finally:
                self.is_waiting = False
        except Interrupted:
            return None

    def ask(self, wish=NOTHING):
        """Begins an agreement: call it on every rank alike, and `agree` after each."""
        self.wishes = torch.tensor(max(wish, self.signum))
        if dist.is_initialized():
            self.work = dist.all_reduce(self.wishes, dist.ReduceOp.MAX, async_op=True)

    def agree(self):
        """The largest wish that any rank had at `ask`, the same on all of them."""
        if self.work:
            self.work.wait()
        self.work, order = None, self.wishes.item()
        self.is_stopping = order > SAVE
        return order

    def stop(self, signum):
        """Hands the signal to the handler that was there before; raises Stopped if that returns."""
        end_workers()
        handler = self.previous.get(signum)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(signum, None)
        raise Stopped(signum)


def end_workers():
    """Ends the loaders' workers: one that waits for stuck storage would hold up the end."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.terminate()


def shield_worker(_=None):
    """For a loader's worker: ignores signals to the whole job, which its parent obeys.

    A worker that SIGTERM ends would take the run with it, in mid-update. SIGTERM from its parent
    ends it: so a loader closes the workers that it no longer needs.
    """
    choose_socket_folder()
    signal.set_wakeup_fd(-1)
    for signum in (*USER_SIGNALS, *TERMINAL):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=obey_parent, daemon=True).start()


def choose_socket_folder():
    """Tensors leave a worker by a socket in a temporary folder, whose path may only be short.

    Without it the worker's batches would be lost and the run wait for them for ever.
    """
    own = os.environ.get("TMPDIR", "")
    for folder in (own, "/tmp", "/var/tmp", "/dev/shm"):
        if 0 < len(os.fsencode(folder)) <= SOCKET_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            return
    raise InputError(
        f"TMPDIR {own!r} and /tmp: loader workers need a folder that they can write to, with a "
        f"path of {SOCKET_FOLDER} bytes at most; set TMPDIR"
    )


def obey_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
