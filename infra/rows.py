"""Rows of text, tables and JSON as they stream, plain or compressed, and the texts of a row.

A damaged file is an InputError that names it and the row. A row of another form than the others,
or without a caption, is counted and left out.
"""

import bz2
import csv
import gzip
import os
import re
from itertools import count, islice

import ijson

from infra.untrusted import BAD_INPUT, first_line
from utils import InputError, foreign_kind, regular_file

# Raised for a single row of another form than its file's others.
BAD_ROW = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

MAX_LINE = 2**24  # characters of a line of text, or of a table's field


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
            if foreign := foreign_kind(path):
                raise InputError(f"metadata {path} {foreign}")
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

    def full_lines(self):
        """The lines that are not blank."""
        return filter(str.strip, self.lines())

    def json_rows(self, prefix):
        """The elements below `prefix` (ijson's: "item" for a list), parsed one by one."""
        for file in self:
            yield from read_json_rows(file, prefix)


def read_lines(file):
    """Lines of a binary file as text. Raises ValueError for one too long.

    Bytes that are no UTF-8 become lone surrogates, which plain_text refuses.
    """
    for line in iter(lambda: file.readline(MAX_LINE), b""):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line has over {MAX_LINE} bytes")
        yield line.removeprefix(BOM).decode(errors="surrogateescape")


BOM = b"\xef\xbb\xbf"  # the mark before the text of some editors' files


def read_json_rows(file, prefix):
    """Yields the elements below `prefix` of a binary file, also of one with NaN, as Python writes.

    ijson refuses NaN. Only then the file is read again, by a slower filter.
    """
    start, number = len(BOM) if file.read(len(BOM)) == BOM else 0, 0
    file.seek(start)
    try:
        for row in ijson.items(file, prefix, use_float=True):
            number += 1
            yield row
    except ijson.JSONError:
        file.seek(start)
        yield from islice(ijson.items(NanAsNull(file), prefix, use_float=True), number, None)


class NanAsNull:
    """A binary file of JSON in which NaN and infinities, outside of texts, read as null."""

    # A text, to its end or to that of the bytes read so far, or a number that JSON does not have.
    TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("|\\?\Z)|-?(?:NaN|Infinity)', re.DOTALL)

    def __init__(self, file):
        self.file, self.rest = file, b""

    def read(self, size):
        ready = []
        while not ready and (more := self.file.read(max(size, len(self.rest)))):
            data, end, keep = self.rest + more, 0, None
            for token in self.TOKENS.finditer(data):
                if token[1] is not None and not token[1].startswith(b'"'):
                    keep = token.start()  # an unfinished text waits for the next bytes
                    break
                own = token[0] if token[1] else b"null"
                ready += [data[end : token.start()], own]
                end = token.end()
            if keep is None:  # as do the first letters of a number
                keep = max(end, len(data) - len("-Infinity"))
            ready, self.rest = [*ready, data[end:keep]], data[keep:]
            ready = [part for part in ready if part]
            if len(self.rest) > MAX_LINE:
                raise ValueError(f"a text has over {MAX_LINE} bytes")
        if not ready:
            ready, self.rest = [self.rest], b""
        return b"".join(ready)


def table_rows(lines, separator, width):
    """Rows of a table as lists of `width` fields; a Dropped for each that has more or fewer.

    Those are most often rows whose caption has a separator without quotes around it. Raises
    csv.Error if the file ends within quotes.
    """
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        first = reader.line_num
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "expected after" not in str(error):
                raise
            # Which rows these lines are is unknown.
            yield from (Dropped("with quotes out of place") for _ in range(first, reader.line_num))
            continue
        if row is None:
            return
        if len(row) == width:
            yield row
        elif row:
            yield Dropped(f"with {'more' if len(row) > width else 'fewer'} fields than the header")


def parse_rows(files, rows, parse, skip=0, replace=None):
    """Yields parse(row) of each row after the first `skip`.

    Args:
        files: the Files that `rows` are read from.
        rows: iterable of rows; reading the next one may fail on a damaged file.
        parse: function of a row; raises one of BAD_ROW if a field is missing or malformed.
        skip: number of rows to read without parsing them.
        replace: function of (a row's place, the reason) that returns the value of a row that does
            not parse; by default such a row is an error.

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
        except StopIteration:
            return
        except BAD_INPUT as error:
            own = number - first if files.path == path else 0
            raise bad_row(files, own, error) from error
        try:
            value = parse(row)
        except BAD_INPUT as error:
            if replace is None or not isinstance(error, BAD_ROW):
                raise bad_row(files, number - first, error) from error
            value = replace(f"{files.path}, row {number - first}", reason_of(error))
        yield value


def reason_of(error):
    return f"no {first_line(error)}" if isinstance(error, KeyError) else first_line(error)


def bad_row(files, number, error):
    return InputError(
        f"metadata {files.path}, row {number}: {reason_of(error)}; the file is damaged, or a field "
        "is missing or malformed"
    )


# ---------------------------------------------------------------------------------------------
# Texts of a row: one rule for all readers of captions


class Dropped(Exception):
    """Raised for a row to leave out; the reason is counted."""


class Malformed:
    """The reason for rows that do not parse: that of the first of them, so that reasons are few."""

    def __init__(self):
        self.reason = None

    def __call__(self, place, reason):
        self.reason = self.reason or f"malformed, the first in {place}: {reason}"
        return self.reason


def kept_rows(files, rows, parse, dropped):
    """Yields parse(row) of the rows that have one; counts in `dropped` why others have none.

    See parse_rows. A row of another form than the others is counted as malformed.
    """

    def attempt(row):
        try:
            return parse(row)
        except Dropped as error:
            return error

    reason = Malformed()
    for row in parse_rows(files, rows, attempt, replace=lambda *fault: Dropped(reason(*fault))):
        if isinstance(row, Dropped):
            dropped[str(row)] += 1
        else:
            yield row


def is_missing(value):
    """Whether it is null or NaN, as tables and JSON spell an absent value."""
    return value is None or (isinstance(value, float) and value != value)


def plain_text(value, what="a text"):
    """A row's text, unchanged. Raises Dropped, naming it as `what`, for anything else."""
    if is_missing(value) or value == "":
        raise Dropped(f"without {what}")
    if not isinstance(value, str):
        raise Dropped(f"with {what} that is no text")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise Dropped(f"with {what} that is not UTF-8") from None
    return value


def path_text(value):
    """An image's path; numbers, as some sets name their images, become text."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return plain_text(str(value) if is_number else value, "an image path")


def only_text(value):
    """The caption of a row that has one. Raises Dropped, or ValueError if there are several."""
    (text,), _ = caption_texts(value)
    return text


def caption_texts(value):
    """The captions of an image: a text, or those of a list of texts that are not null.

    Returns (texts, number of nulls). An empty text stays if another of the list is not. Raises
    Dropped if there is no text, or anything that is none.
    """
    several = value if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in several if not is_missing(text)]
    texts = [plain_text(text, "a caption") if text != "" else text for text in texts]
    if not any(text.strip() for text in texts):
        raise Dropped("without a caption")
    return texts, len(several) - len(texts)
