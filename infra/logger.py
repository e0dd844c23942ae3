"""The log of a run: lines on screen, log.txt, args.json, and WRITERS: TensorBoard, wandb.

Rank 0 keeps it; the other ranks have a SilentLog.
"""

import json
import os
import platform
import secrets
import subprocess
import sys
import threading
from argparse import ArgumentTypeError
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.distributed import get_world_size, is_main_process
from utils import (
    InputError,
    make_folder,
    one_line,
    read_json,
    regular_file,
    remove_temporaries,
    write_atomically,
    write_json,
)


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


# ---------------------------------------------------------------------------------------------
# Writers of numbers and pictures: (folder, the update that the run is at) -> an object with the
# methods settings, scalars, picture, flush and close; `faults` of theirs never end the run


class TensorBoard:
    """Events in the run's folder; those from the update that the run is at on are written anew."""

    faults = OSError

    def __init__(self, folder, update):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only when needed

        if os.fsencode(folder) != str(folder).encode(errors="replace"):
            raise InputError(
                f"output folder {str(folder)!r}: TensorBoard's files need a name in UTF-8; choose "
                "another"
            )
        self.writer = SummaryWriter(folder, purge_step=update)
        self.flush, self.close = self.writer.flush, self.writer.close

    def settings(self, settings):
        pass  # args.json has them

    def scalars(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name, image, step):
        self.writer.add_image(name, image, step)


class Wandb:
    """A run of Weights & Biases, in the mode and project that its environment variables say.

    Its id is in the folder's wandb.json: a run that resumes goes on in the same one. The numbers
    of "train/loss" are drawn over "train/step".
    """

    faults = Exception  # a service elsewhere may fail in any way
    patience = 10.0  # seconds to wait at the end: a preempted job has to queue itself again

    def __init__(self, folder, update):
        import wandb

        path = os.path.join(folder, "wandb.json")
        if update and os.path.exists(path):
            run_id = read_json(path, "wandb's id")["id"]
        else:
            run_id = secrets.token_hex(4)
            write_json(path, {"id": run_id})
        name = os.path.basename(os.path.abspath(folder))
        self.image, self.groups = wandb.Image, set()
        self.run = wandb.init(id=run_id, resume="allow", name=name, dir=str(folder))

    def settings(self, settings):
        self.run.config.update(settings, allow_val_change=True)

    def scalars(self, values, step):
        groups = {name.partition("/")[0] for name in values}
        for group in groups - self.groups:
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self.groups |= groups
        self.run.log({**values, **{f"{group}/step": step for group in groups}})

    def picture(self, name, image, step):
        """image: (3, H, W), from 0 to 1."""
        pixels = image.permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
        self.run.log({name: self.image(pixels)})

    def flush(self):
        pass  # its own process sends and writes all the time

    def close(self):
        end = threading.Thread(target=self.run.finish, daemon=True)
        end.start()
        end.join(self.patience)
        if end.is_alive():
            raise TimeoutError(f"its upload was not done in {self.patience:g} s")


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def writer(text):
    """A name of WRITERS, for argparse."""
    if text not in WRITERS:
        names = " ".join(WRITERS)
        raise ArgumentTypeError(f"{text!r} is no writer; give some of {names}, blanks between them")
    return text


def check_writers(names):
    """Raises InputError if a writer's package is absent."""
    if "wandb" in names and not getattr(find_spec("wandb"), "origin", None):  # a folder is none
        raise InputError("wandb is not installed: pip install wandb, or report to tensorboard")


# ---------------------------------------------------------------------------------------------
# The log


class Logger:
    """Rank 0's: lines on screen, log.txt, args.json and the writers."""

    def __init__(self, output_dir, first_epoch=0, first_update=0, writers=("tensorboard",)):
        """
        Args:
            output_dir: folder to write to.
            first_epoch, first_update: the entries from these on are written anew.
            writers: names of WRITERS.
        """
        self.output_dir = make_folder(output_dir)
        self.file, self.said, self.writers = self.output_dir / "log.txt", set(), {}
        for name in ("log.txt", "args.json"):  # of a run that was killed; the folder is locked
            remove_temporaries(self.output_dir / name, days=0)
        for name in dict.fromkeys(writers):
            with self.tolerant(name, WRITERS[name].faults):
                self.writers[name] = WRITERS[name](self.output_dir, first_update)
        if self.file.exists() and first_epoch == 0:  # of another run: moved aside
            os.replace(self.file, f"{self.file}.old")
        elif self.file.exists():  # drops epochs that will be run again
            kept = [row for row in read_log(self.file) if row["epoch"] < first_epoch]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            with self.tolerant():
                write_atomically(self.file, lambda file: file.write(text.encode()))

    @contextmanager
    def tolerant(self, name="the log", faults=OSError):
        """A full disk costs lines of the log, never the run."""
        try:
            yield
        except faults as error:
            reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
            self.info_once(f"warning: {name} is incomplete: {reason}", topic=name)

    def write(self, method, *args):
        """Calls a method of every writer."""
        for name, writer in self.writers.items():
            with self.tolerant(name, writer.faults):
                getattr(writer, method)(*args)

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
        self.write("settings", settings)

    def epoch(self, stats):
        """One JSON object a line; the writers get the same numbers by epoch."""
        with self.tolerant(), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")
        self.scalars({f"epoch/{key}": value for key, value in stats.items()}, stats["epoch"])
        self.flush()

    def flush(self):
        self.write("flush")

    def dump(self, name, value):
        """Writes a value as a JSON file beside the log; returns its path."""
        with self.tolerant():
            write_json(self.output_dir / name, value)
        return str(self.output_dir / name)

    def scalars(self, values, step):
        self.write("scalars", values, step)

    def picture(self, name, image, step=0):
        self.write("picture", name, image, step)

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
        self.write("close")
        self.writers = {}  # a run that is stopped closes its log twice


class SilentLog:
    """The other ranks': ignores everything."""

    def progress(self, total, title, done=0):
        return nullcontext(self.ignore)

    def ignore(self, *args, **options):
        pass

    info = info_once = settings = epoch = flush = dump = scalars = picture = close = ignore


def open_log(*args):
    return Logger(*args) if is_main_process() else SilentLog()
