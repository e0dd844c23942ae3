"""The log of a run: lines on screen, log.txt, args.json, TensorBoard's events.

Rank 0 keeps it; the other ranks have a SilentLog.
"""

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.distributed import get_world_size, is_main_process
from utils import InputError, make_folder, regular_file, write_atomically, write_json


def git_revision():
    """The commit of this code, "-dirty" behind it if files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return git.stdout.strip() or None


def describe_run(args, **derived):
    """All that is needed to repeat a run: flags, command, code revision, versions, ranks."""
    import timm
    import torchvision

    modules = (torch, torchvision, timm, np)
    return {
        "args": vars(args),
        "argv": sys.argv,
        "git": git_revision(),
        "versions": {"python": platform.python_version()}
        | {module.__name__: str(module.__version__) for module in modules},
        "world_size": get_world_size(),
        **derived,
    }


def read_log(path):
    """The rows of a log.txt; a line that is no row (cut short by a kill, say) is skipped."""
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace", opener=regular_file) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise InputError(f"log {path}: {error.strerror}; remove it") from error
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
    return rows


class Logger:
    """Rank 0's: writes lines on screen, log.txt, args.json and TensorBoard's events."""

    def __init__(self, output_dir, first_epoch=0, first_update=0):
        """first_epoch, first_update: the entries from these on are written anew."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only when needed

        self.output_dir = make_folder(output_dir)
        if os.fsencode(output_dir) != str(output_dir).encode(errors="replace"):
            raise InputError(
                f"output folder {output_dir!r}: TensorBoard's files need a name in UTF-8; choose "
                "another"
            )
        self.file, self.said = self.output_dir / "log.txt", set()
        if self.file.exists() and first_epoch == 0:  # of another run: moved aside
            os.replace(self.file, f"{self.file}.old")
        elif self.file.exists():  # drops epochs that will be run again
            kept = [row for row in read_log(self.file) if row["epoch"] < first_epoch]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            with self.tolerant():
                write_atomically(self.file, lambda file: file.write(text.encode()))
        self.writer = SummaryWriter(output_dir, purge_step=first_update)

    @contextmanager
    def tolerant(self):
        """A full disk costs lines of the log, never the run."""
        try:
            yield
        except OSError as error:
            self.info_once(f"warning: the log is incomplete: {error.strerror or error}")

    def info(self, text):
        print(text, flush=True)

    def info_once(self, text, topic=None):
        """Logs the first text of a topic, which is the text itself if none is given."""
        if (topic or text) not in self.said:
            self.said.add(topic or text)
            self.info(text)

    def settings(self, settings):
        with self.tolerant():
            write_json(self.output_dir / "args.json", settings)

    def epoch(self, stats):
        """One JSON object a line; TensorBoard gets the same numbers by epoch."""
        with self.tolerant(), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")
        self.scalars({f"epoch/{key}": value for key, value in stats.items()}, stats["epoch"])
        self.flush()

    def flush(self):
        with self.tolerant():
            self.writer.flush()

    def dump(self, name, value):
        """Writes a value as a JSON file beside the log; returns its path."""
        with self.tolerant():
            write_json(self.output_dir / name, value)
        return str(self.output_dir / name)

    def scalars(self, values, step):
        with self.tolerant():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, name, image, step=0):
        with self.tolerant():
            self.writer.add_image(name, image, step)

    @contextmanager
    def progress(self, total, title, done=0):
        """Yields report(done, means, speed): a bar on a terminal, a line each time elsewhere."""
        is_plain = not sys.stderr.isatty()
        with tqdm(total=total, desc=title, disable=is_plain, unit="update", initial=done) as bar:

            def report(done, means, speed):
                bar.update(done - bar.n)
                numbers = {key: f"{value:.4f}" for key, value in means.items()} | {
                    "samples/s": f"{speed['samples_per_sec']:.1f}",
                    "data wait": f"{speed['data_wait']:.0%}",
                }
                bar.set_postfix(numbers)
                if bar.disable:
                    left = tqdm.format_interval(speed["elapsed"] / done * (total - done))
                    text = "  ".join(f"{key} {value}" for key, value in numbers.items())
                    self.info(f"{title} [{done}/{total}]  {text}  left {left}")

            yield report

    def close(self):
        with self.tolerant():
            self.writer.close()


class SilentLog:
    """The other ranks': ignores everything."""

    def progress(self, total, title, done=0):
        return nullcontext(self.ignore)

    def ignore(self, *args, **options):
        pass

    info = info_once = settings = epoch = flush = dump = scalars = picture = close = ignore


def open_log(*args):
    return Logger(*args) if is_main_process() else SilentLog()
