"""Scripts around ours that end them early; run by the tests, on one rank or several.

python lives.py stop FOLDER main FLAGS  # stopped each time it could be, and started again
python lives.py die HOW FLAGS      # rank 1 ends in its third update: exit, raise or kill
python lives.py once FILE FLAGS    # the same by kill, the first time
python lives.py hang N main FLAGS  # on the last rank, reading an image never ends from the Nth on
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import catalog
import datasets
import main
import tests.warm  # noqa: F401
from infra import archives, distributed
from infra.run import Run
from infra.signals import NOTHING, Stopped


class Stops:
    """Replaces Run.due: a stop the first time that a run can be stopped at a place."""

    def __init__(self):
        self.seen, self.calls, self.at = set(), 0, None

    def due(self, run):
        run.signals.agree()  # ends the agreement that was begun
        updates = run.state.updates
        self.calls = self.calls + 1 if self.at == updates else 0
        self.at = updates
        if (self.at, self.calls) in self.seen:
            return NOTHING
        self.seen.add((self.at, self.calls))
        return signal.SIGUSR2


def stop_everywhere(folder, name, *flags):
    """Prints the number of lives; the ranks of each meet at a place of its own."""
    script, stops, lives = importlib.import_module(name), Stops(), 0
    Run.due = lambda run: stops.due(run)
    is_over = False
    while not is_over:
        lives, stops.at = lives + 1, None
        url = f"file://{folder}/{lives}"
        args = script.get_args_parser().parse_args([*flags, "--dist-url", url])
        torch.manual_seed(lives)  # nothing of an earlier life may help a later one
        try:
            with distributed.report_errors():
                script.main(args)
            is_over = True
        except Stopped:
            continue
    print("lives:", lives)


def die(how):
    os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)


def end_rank_1(how, flags, marker=None):
    due, calls = Run.due, []

    def fatal(run):
        calls.append(1)
        if len(calls) == 3 and distributed.get_rank() == 1 and not (marker and marker.exists()):
            if marker:
                marker.touch()
            if how == "raise":
                raise RuntimeError("rank 1 has had enough")
            die(how)
        return due(run)

    Run.due = fatal
    distributed.run_script(lambda: main.main(main.get_args_parser().parse_args(flags)))


def hang_at(number, name, flags):
    """A pipe that nobody writes to stands for storage that does not answer."""
    read, calls = archives.read_file, []

    def stuck(root, path):
        calls.append(path)
        if len(calls) >= number and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            print("stuck", flush=True)
            os.read(os.pipe()[0], 1)
        return read(root, path)

    datasets.read_file = catalog.read_file = stuck
    script = importlib.import_module(name)
    distributed.run_script(lambda: script.main(script.get_args_parser().parse_args(flags)))


if __name__ == "__main__":
    command, value, *flags = sys.argv[1:]
    if command == "stop":
        stop_everywhere(value, *flags)
    elif command == "hang":
        hang_at(int(value), flags[0], flags[1:])
    elif command == "die":
        end_rank_1(value, flags)
    else:
        end_rank_1("kill", flags, Path(value))
