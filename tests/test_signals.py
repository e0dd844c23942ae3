"""Signals that stop a run, and the shield of loader workers."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import connection

import pytest
from launch import REPOSITORY

from infra import distributed, signals
from infra.signals import NOTHING, SAVE, SignalHandler, Stopped
from utils import InputError


def agreed(held, wish=NOTHING):
    held.ask(wish)
    return held.agree()


def test_signals_are_noted_until_asked_for_and_handlers_come_back():
    before = [signal.getsignal(s) for s in signals.STOPPING]
    with SignalHandler() as held:
        held.hold()
        assert agreed(held) == NOTHING and agreed(held, SAVE) == SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        assert agreed(held) == agreed(held, SAVE) == signal.SIGTERM
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
            assert agreed(held) == signum and not calls
            with pytest.raises(Stopped):
                held.stop(agreed(held))
        assert calls == [signum]
    finally:
        signal.signal(signum, before)


def test_signals_that_nohup_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as held:
            held.hold()
            os.kill(os.getpid(), signal.SIGHUP)
            assert agreed(held) == NOTHING
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_wait_is_cut_short():
    """By a signal before it or in it; one after it waits for its turn."""
    with SignalHandler() as held:
        held.hold()
        assert held.wait(lambda: 3) == 3
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
        began = time.monotonic()
        assert held.wait(lambda: os.read(os.pipe()[0], 1)) is None
        assert held.wait(lambda: 3) is None
        assert time.monotonic() - began < 5
        assert agreed(held) == signal.SIGHUP
        with pytest.raises(Stopped) as stopped:
            held.stop(signal.SIGINT)
        assert stopped.value.code == 130  # and no KeyboardInterrupt


def test_a_script_without_a_run_ends_at_ctrl_c_in_one_line(capsys):
    def script():
        raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        distributed.run_script(script)
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("length", [75, 76, 200])
def test_sockets_of_workers_have_short_paths(tmp_path, monkeypatch, length):
    """In a long TMPDIR they could not be made, and the run would wait for batches for ever."""
    folder = f"/tmp/{tmp_path.name}-".ljust(length, "x")
    os.makedirs(folder, exist_ok=True)
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    try:
        signals.choose_socket_folder()
        assert tempfile.gettempdir() == (folder if length <= 75 else "/tmp")
        connection.Listener(f"{tempfile.mkdtemp(prefix='pymp-')}/listener-12345678").close()
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(InputError, match="a path of 75 bytes at most; set TMPDIR"):
            signals.choose_socket_folder()
    finally:
        shutil.rmtree(folder)


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
    for name in ("TERM", "USR1", "USR2", "INT", "HUP", "TERM"):
        signum = getattr(signal, "SIG" + name)
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
