"""Signals that stop a run, and the shield of loader workers."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launch import REPOSITORY

from infra import signals
from infra.signals import NOTHING, SAVE, SignalHandler, Stopped


def test_signals_are_noted_until_asked_for_and_handlers_come_back():
    before = [signal.getsignal(s) for s in signals.STOPPING]
    with SignalHandler() as held:
        held.hold()
        assert held.agree() == NOTHING and held.agree(SAVE) == SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        assert held.agree() == held.agree(SAVE) == signal.SIGTERM
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
            assert held.agree() == signum and not calls
            with pytest.raises(Stopped):
                held.stop(held.agree())
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
