"""The ground that everything stands on: user errors, flags, files, random states.

Imports nothing of this repository, and knows no model, loss or data.
"""

import argparse
import errno
import fcntl
import glob
import json
import math
import os
import random
import secrets
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch


class InputError(Exception):
    """The user's input is at fault: one line that says which thing, which value, and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """Every script's: flags are spelled out, help shows defaults, an error is an InputError."""

    def __init__(self, prog=None, description=None):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, None, description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def number(kind, low, below=math.inf):
    """An argparse type: an int or float of at least `low` and less than `below`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be {low} or more{limit}")
        return value

    parse.__name__ = kind.__name__  # argparse names it if text is no number
    return parse


natural = number(int, 0)
positive_int = number(int, 1)
positive = number(float, 1e-12)
not_negative = number(float, 0.0)


def one_line(error):
    # From a loader's worker the text comes after its traceback.
    return " ".join(str(error).split("utils.InputError: ")[-1].split())


# ---------------------------------------------------------------------------------------------
# Files


def regular_file(path, flags):
    """The opener, for open(), of strangers' files: a pipe or a device might never come to its end.

    Raises OSError for these, and for a folder.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # no waiting for a pipe's writer
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file", path)


def foreign_kind(path):
    """Words for a file that often lies in another's place, None for all others."""
    with open(path, "rb", opener=regular_file) as file:
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs; fetch the file itself by git lfs pull"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page; download the file that the page shows or links to"
    if head[8:9] == b"{" and 1 < int.from_bytes(head[:8], "little") <= size - 8:
        return "is a safetensors file; it holds weights alone, so take the file of the training run"
    return None


def read_json(path, kind):
    """The parsed JSON file; `kind` names it in errors. Raises InputError if absent or malformed."""
    try:
        if foreign := foreign_kind(path):
            raise InputError(f"{kind} {path} {foreign}")
        with open(path, encoding="utf-8-sig", opener=regular_file) as file:  # a BOM is no matter
            return json.load(file)
    except OSError as error:
        raise InputError(f"{kind} {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind} {path} is not valid JSON: {error}") from error


def read_json_object(path, kind):
    """The object in a JSON file, as a dict."""
    table = read_json(path, kind)
    if not isinstance(table, dict):
        raise InputError(f"{kind} {path} is no JSON object of named entries; check the file")
    return table


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path}: {error.strerror}; choose another") from error
    return Path(path)


@contextmanager
def temporary_name(path):
    """Yields a name beside `path` that no other process or container uses.

    Its file is gone at the end, renamed or removed. A process that was killed leaves it; it goes
    after a day, when `path` is written again.
    """
    name = f"{path}.{secrets.token_hex(8)}.tmp"
    remove_temporaries(path, days=1)
    try:
        yield name
    finally:
        with suppress(OSError):
            os.unlink(name)


def remove_temporaries(path, days):
    """Removes the files of `temporary_name` for `path` that nobody wrote to for so many days."""
    for name in glob.glob(f"{glob.escape(str(path))}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):  # another process may have renamed or removed it
            if time.time() - os.stat(name).st_mtime >= 24 * 3600 * days:
                os.unlink(name)


def write_atomically(path, write, verify=lambda path: None):
    """Calls write(file) on a binary file beside `path`, flushes it to disk, then renames it.

    verify: called with the path of the new file before it takes the place of the old one.
    """
    try:
        with temporary_name(path) as temporary:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            verify(temporary)
            os.replace(temporary, path)
    except OSError as error:
        error.filename = os.fspath(path)
        raise


@contextmanager
def locked(path):
    """Keeps other processes, on all machines, from the same context of `path`: they wait.

    The lock is a file beside it, .NAME.lock. Yields whether there is one: some file systems have no
    locks, and if the folder is at fault, whoever writes `path` then says so.
    """
    folder, name = os.path.split(path)
    lock = os.path.join(folder, f".{name}.lock")
    descriptor = None
    with suppress(OSError):
        while descriptor is None:
            descriptor = open_lock(lock)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(OSError):
                os.unlink(lock)
            os.close(descriptor)


def open_lock(path):
    """The locked file's descriptor; None if its former owner has removed the file meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(OSError):  # absent, or on another machine's word
            here = os.fstat(descriptor)
            if here.st_nlink and os.path.samestat(here, os.stat(path)):
                kept, descriptor = descriptor, None
                return kept
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    # A file's name may hold bytes that are no text; JSON spells them as Python does.
    data = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(data))


def update_json(path, entries):
    """Adds entries to the object in a JSON file, which need not be there yet.

    Processes that do so at once wait for each other, and lose nothing.
    """
    with locked(path):
        old = read_json(path, "results") if os.path.exists(path) else {}
        write_json(path, {**(old if isinstance(old, dict) else {}), **entries})


# ---------------------------------------------------------------------------------------------
# Random states


def seed_everything(*numbers):
    """Seeds Python, NumPy and PyTorch with one number made from `numbers` (seed, epoch, rank)."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


CPU = torch.device("cpu")


def get_rng_state(device=CPU):
    """The random states of Python, NumPy and PyTorch, as plain data that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state()
    keys = torch.from_numpy(keys.astype(np.int64))  # unsigned tensors cannot be pickled
    state = {"python": random.getstate(), "numpy": (name, keys, *rest)}
    state["torch"] = torch.get_rng_state()
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state, device=CPU):
    """Restores a state of get_rng_state; that of CUDA only if there is one."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(seed):
    """Python, NumPy and PyTorch (CPU) draw from `seed` within, and continue as before after it."""
    state = get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
