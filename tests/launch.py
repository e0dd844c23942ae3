"""Starts the scripts as processes, each in a process group of its own.

`run_command` runs the command that a user types. It imports everything anew, which takes a core
8 s. `start` and `run_script` fork from a server that has imported everything but run no PyTorch.
conftest.py forks that server itself from each process of pytest, once it has collected the tests.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ["main", "main_linear", "main_finetune", "eval_zeroshot", "eval_retrieval"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*SCRIPTS, "torch.utils.tensorboard", "timm.data", "tests.warm"])


def fork_server(executable, arguments, descriptors):
    """multiprocessing.util.spawnv_passfds without exec: a fork has all imports of this process.

    Of its open files it keeps the streams and those that are passed, as after exec: a copy of
    another end of a pipe would keep a reader from its end.
    """
    gc.collect()  # a file that is closed later would close another one of its number
    pid = os.fork()
    if pid:
        return pid
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in descriptors:
                with suppress(OSError):
                    os.close(int(name))
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def start_server():
    """Starts the server that processes are forked from; to be called before PyTorch runs."""
    resource_tracker.ensure_running()
    with patch("multiprocessing.util.spawnv_passfds", fork_server):
        forking()


def forking():
    """The multiprocessing context of the server that processes are forked from."""
    with patch.dict(os.environ, PYTHONPATH=str(REPOSITORY)):
        forkserver.ensure_running()
    return CONTEXT


def run_command(script, flags, ranks=1, cwd=REPOSITORY, options=()):
    """Runs a script as a user does, and by torchrun if there are several ranks.

    options: torchrun's. Returns subprocess.CompletedProcess.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, *options, str(REPOSITORY / script), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
    )


class Running:
    """A forked script, whose stdout and stderr go to one file."""

    def __init__(self, script, flags, log, environment):
        arguments = (str(script), [*map(str, flags)], str(log), environment)
        self.process = forking().Process(target=run_forked, args=arguments)
        self.process.start()
        self.log, self.pid = Path(log), self.process.pid

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout=120):
        """Waits for the end; returns the exit code, -N if signal N ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
        return self.process.exitcode

    def wait_for(self, condition, timeout=60):
        """Waits for condition() while the script runs; returns True if it was met."""
        end = time.monotonic() + timeout
        while self.process.exitcode is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def says(self, text, timeout=60):
        return self.wait_for(lambda: text in self.text(), timeout)

    def signal(self, signum, whole_group=False):
        with suppress(ProcessLookupError):
            if whole_group:
                os.killpg(self.pid, signum)
            else:
                os.kill(self.pid, signum)

    def kill(self):
        self.signal(signal.SIGKILL, whole_group=True)
        self.signal(signal.SIGKILL)  # if it has no group yet
        self.process.join(30)


def run_forked(script, flags, log, environment):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a new process
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1, closefd=False) for i in (1, 2))
    os.environ.update(environment)
    sys.argv = [script, *flags]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, flags, log, ranks=1, **environment):
    """Starts a script on several ranks; returns a Running per rank, with the log f"{log}{rank}"."""
    common = environment | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        Running(script, flags, f"{log}{r}", common | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]


def run_script(script, flags, ranks=1, **environment):
    """Runs a script on several ranks to its end.

    Returns returncode, the first that is not 0, and stdout and stderr, both the text of all ranks.
    """
    log = os.path.join(tempfile.mkdtemp(), "rank")
    running = start(script, flags, log, ranks, **environment)
    codes = [process.wait() for process in running]
    text = "".join(process.text() for process in running)
    return SimpleNamespace(returncode=next(filter(None, codes), 0), stdout=text, stderr=text)
