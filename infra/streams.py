"""stdout and stderr that outlive their readers: a closed pipe, a full disk cost text, not a run."""

import os
import sys
from contextlib import contextmanager, suppress


class Tolerant:
    """A text stream that loses what it cannot write, and says so once on stderr."""

    def __init__(self, stream, name):
        self.stream, self.name, self.is_told = stream, name, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def writelines(self, lines):
        self.write("".join(lines))

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError) as error:  # of a closed stream it is a ValueError
            reason = getattr(error, "strerror", None) or error
            if not self.is_told:
                self.is_told = True
                sys.stderr.write(f"warning: {self.name} is incomplete from here on: {reason}\n")

    def close_quietly(self):
        """Python's own last flush would end the process with an error."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_null():
    """Takes the place of a stream that was closed before the start, and its descriptor, too.

    Otherwise the next file that is opened would get what C libraries print.
    """
    return open(os.devnull, "w", encoding="utf-8")  # to the end of the process


@contextmanager
def tolerant_streams():
    """Within, what stdout and stderr cannot write is lost, and characters they lack are escaped."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    streams = [
        Tolerant(stream or open_null(), name)
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    ]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.close_quietly()
        sys.stdout, sys.stderr = before
