"""Strangers' files, read as plain data: pickles, .npy, and paths; rows.py has text and tables.

Nothing in a file is ever executed, no claimed size is believed beyond a limit, and every failure
to read is an InputError that names the file.
"""

import csv
import os
import pickle
import resource
import sqlite3
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import ijson
import numpy as np
import pyarrow as pa

from utils import InputError, foreign_kind, regular_file

# Raised by parsers of text, tables and archives when a file is damaged or of another format.
BAD_INPUT = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError)
BAD_INPUT += (RecursionError, TypeError, ValueError, csv.Error, ijson.JSONError, sqlite3.Error)
BAD_INPUT += (tarfile.TarError, zipfile.BadZipFile, zlib.error, pa.ArrowException)

SLACK = 2**28  # bytes that reading any file may take beyond those that its size explains


# ---------------------------------------------------------------------------------------------
# Pickles and .npy, as plain data


def latin1(text, encoding):
    """Bytes as protocol-2 pickles spell them, the one use of _codecs.encode that is allowed."""
    if encoding != "latin1":
        raise InputError(f"refused: it names the codec {encoding!r}")
    return text.encode("latin1")


class PlainDtype:
    """Stands for numpy.dtype: NumPy's own reads foreign memory when its state is hostile."""

    def __init__(self, code, *flags):
        if code[:1] not in tuple("ObiufSU") or not code[1:].isdigit():
            raise ValueError(f"dtype {code!r} is not of plain numbers or text")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self):
        return np.dtype(self.order + self.code)


class PlainArray(list):
    """Stands for numpy.ndarray: the elements of an array of one dimension."""

    def __init__(self, *shape_and_code):
        super().__init__()

    def __setstate__(self, state):
        _, shape, dtype, _, data = state
        self[:] = data if isinstance(data, list) else np.frombuffer(data, dtype.numpy()).tolist()
        if tuple(shape) != (len(self),):
            raise ValueError(f"an array of shape {shape} holds {len(self)} elements")


def plain_array(kind, shape, code):
    return PlainArray()


def plain_scalar(dtype, data):
    return np.frombuffer(data, dtype.numpy())[0].item()


PLAIN_GLOBALS = {
    ("_codecs", "encode"): latin1,
    ("numpy", "ndarray"): PlainArray,
    ("numpy", "dtype"): PlainDtype,
}
for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    PLAIN_GLOBALS[f"{package}.multiarray", "_reconstruct"] = plain_array
    PLAIN_GLOBALS[f"{package}.multiarray", "scalar"] = plain_scalar


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers and strings, also from NumPy's arrays, and nothing else."""

    def find_class(self, module, name):
        if (module, name) not in PLAIN_GLOBALS:
            raise InputError(f"refused: it names {module}.{name}, which is code and not data")
        return PLAIN_GLOBALS[module, name]

    def persistent_load(self, identifier):
        raise InputError("refused: it holds a persistent id, which is not plain data")


@contextmanager
def memory_limit(size):
    """Limits new allocations inside the context to `size` bytes; beyond it is a MemoryError."""
    status = Path("/proc/self/statm")
    if not status.exists():  # not Linux
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(status.read_text().split()[0]) * resource.getpagesize() + size
    allowed = [bound, *(limit for limit in limits if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_pickle(file):
    """The plain data in a pickle; its objects may take 32 times the file's size plus SLACK."""
    with memory_limit(32 * os.fstat(file.fileno()).st_size + SLACK):
        return PlainUnpickler(file).load()


def read_npy(file):
    """The array in a .npy file; object arrays hold plain data only."""
    npy = np.lib.format
    is_first = npy.read_magic(file) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    if read_header(file)[2].hasobject:
        return read_pickle(file)
    file.seek(0)
    with memory_limit(2 * os.fstat(file.fileno()).st_size + SLACK):
        return np.load(file, allow_pickle=False)


def first_line(error):
    """The first line of a parser's message; some parsers add an excerpt of the file below it."""
    text = error.args[0] if error.args and isinstance(error.args[0], bytes) else str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return text.strip().partition("\n")[0].strip() or type(error).__name__


@contextmanager
def named_failures(name):
    """Every failure within is an InputError of one line that begins with `name`.

    Also the panics of libraries in Rust, which are no Exceptions.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise InputError(f"{name} cannot be used ({reason})") from error


def read_metadata(path, parse):
    """The result of parse(binary file); every failure is an InputError that names the file."""
    try:
        if foreign := foreign_kind(path):
            raise InputError(foreign)
        with open(path, "rb", opener=regular_file) as file:
            return parse(file)
    except OSError as error:
        raise InputError(f"metadata {path}: {error.strerror or error}; check the path") from error
    except InputError as error:
        raise InputError(f"metadata {path} {error}") from error
    except MemoryError as error:
        raise InputError(f"metadata {path} claims more memory than its size allows") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"metadata {path} does not parse ({first_line(error)}); check that it is complete "
            "and of the expected format"
        ) from error


# ---------------------------------------------------------------------------------------------
# Paths that a file lists


def check_inside(root, path, what, allowed=False):
    """Raises InputError if a path that some file lists leads out of `root`.

    Only the text counts: symbolic links below root may lead anywhere.

    Args:
        root: folder that `path` is relative to.
        path: the listed path.
        what: names the path in the error, such as "metadata: image".
        allowed: bool, the user's permission to leave root.
    """
    if allowed or not (".." in path or path.startswith("/")):  # the usual case, for every sample
        return
    top = os.path.abspath(root)
    if not os.path.abspath(os.path.join(top, path)).startswith(top.rstrip("/") + "/"):
        raise InputError(
            f"{what} {path!r} leaves its folder {str(root)!r}; correct it, or allow paths outside "
            "of the root if you trust it"
        )
