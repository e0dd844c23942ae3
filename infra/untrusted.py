"""Strangers' files, read as plain data: pickles, .npy, text and JSON as they stream, and paths.

Nothing in a file is ever executed, no claimed size is believed beyond a limit, and every failure
to read is an InputError that names the file.
"""

import bz2
import csv
import gzip
import os
import pickle
import resource
import sqlite3
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import ijson
import numpy as np
import pyarrow as pa

from utils import InputError, regular_file

# Raised by parsers of text, tables and archives when a file is damaged or of another format.
BAD_INPUT = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError)
BAD_INPUT += (RecursionError, TypeError, ValueError, csv.Error, ijson.JSONError, sqlite3.Error)
BAD_INPUT += (tarfile.TarError, zipfile.BadZipFile, zlib.error, pa.ArrowException)

MAX_LINE = 2**24  # characters of a line of text
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


def read_metadata(path, parse):
    """The result of parse(binary file); every failure is an InputError that names the file."""
    try:
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
# Text and JSON, plain or compressed, read row by row

OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


class Files:
    """Input files read one after another.

    `path` is the open file, by which errors name the culprit; share() is the progress through all.
    """

    def __init__(self, paths):
        self.paths = [os.fspath(path) for path in paths]
        self.path, self.raw, self.before = next(iter(self.paths), None), None, 0
        try:
            self.size = sum(os.path.getsize(path) for path in self.paths)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; check the path") from error

    def __iter__(self):
        """Each file, opened as bytes; .gz and .bz2 are decompressed."""
        for path in self.paths:
            self.path = path
            with open(path, "rb", opener=regular_file) as self.raw:
                opener = OPENERS.get(os.path.splitext(path)[1])
                yield opener(self.raw, "rb") if opener else self.raw
                self.before += self.raw.tell()
                self.raw = None

    def share(self):
        """The share of all bytes read so far, 0 to 1."""
        done = self.before + (self.raw.tell() if self.raw and not self.raw.closed else 0)
        return min(done / max(self.size, 1), 1.0)

    def signature(self):
        """[path, size, modification time] of each file, which changes if an input does."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def lines(self):
        for file in self:
            yield from read_lines(file)

    def json_rows(self, prefix):
        """The elements below `prefix` (ijson's: "item" for a list), parsed one by one."""
        for file in self:
            yield from ijson.items(file, prefix, use_float=True)


def read_lines(file):
    """Lines of a binary file as text. Raises ValueError for one too long or not UTF-8."""
    for line in iter(lambda: file.readline(MAX_LINE), b""):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line has over {MAX_LINE} bytes")
        yield line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")


def parse_rows(files, rows, parse, skip=0):
    """Yields parse(row) of each row after the first `skip`.

    Args:
        files: the Files that `rows` are read from.
        rows: iterable of rows; reading the next one may fail on a damaged file.
        parse: function of a row; raises one of BAD_INPUT if a field is missing or malformed.
        skip: number of rows to read without parsing them.

    Raises InputError with the file, and with the row's number in that file.
    """
    path, first = None, 0
    try:
        rows = iter(rows)
    except TypeError:
        raise InputError(
            f"metadata {files.path} holds no list of rows; choose the dataset that it belongs to"
        ) from None
    for number in count():
        try:
            row = next(rows)
            if files.path != path:
                path, first = files.path, number
            if number < skip:
                continue
            value = parse(row)
        except StopIteration:
            return
        except BAD_INPUT as error:
            own = number - first if files.path == path else 0
            reason = first_line(error)
            reason = f"no {reason}" if isinstance(error, KeyError) else reason
            raise InputError(
                f"metadata {files.path}, row {own}: {reason}; the file is damaged, or a field is "
                "missing or malformed"
            ) from error
        yield value


def plain_text(value):
    """A row's text, unchanged. Raises one of BAD_INPUT for other types and lone surrogates."""
    value.encode()
    return value


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
