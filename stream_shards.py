"""Streams of tar shards, read once from front to back: outputs of commands, and URLs.

The webdataset library reads the tars, which may be packed. A command that fails, ends early or
hangs is tried again. The order of samples is in lanes.py.
"""

import lzma
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from infra.braces import alternatives
from infra.rows import Dropped
from infra.tars import Follower
from shards import IMAGES, MAGIC, captions_of, find_shards, plain_name
from utils import InputError, positive_int

SCHEMES = ("pipe", "http", "https")
PATIENCE = 60.0  # seconds without a byte after which a command counts as hung
RETRIES = 2  # of a shard, before its rest counts as lost
PAUSE = 3.0  # seconds before each of them
CHUNK = 2**16  # bytes

# Ends the whole process group once stdin closes, as it does when the reader ends in any way.
GUARD = """exec 3<&0 </dev/null
{ read -r _ <&3; kill -9 0; } >/dev/null 2>&1 &
exec 3<&-
eval "$1"
"""
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, RecursionError)
DAMAGE += (zlib.error, lzma.LZMAError)


def add_stream_flags(add):
    """Adds the flags of streams of shards, with add_argument of their group."""
    add("--train-num-samples", type=positive_int, help="samples of an epoch of a stream")
    text = "draw the shards of a stream with replacement"
    add("--dataset-resampled", action="store_true", help=text)
    text = "weights in these draws, one for each source: 2::1"
    add("--train-data-upsampling-factors", default="", help=text)


# ---------------------------------------------------------------------------------------------
# Names of the shards of a stream


@dataclass
class Stream:
    """A set of shards of unknown lengths; len() is the number of samples of an epoch.

    Attributes:
        urls: of the shards.
        weights: of each shard in draws with replacement; None without them.
        keys: fields of captions in .json, as captions_of takes them.
        samples: of an epoch, of all ranks together.
    """

    urls: list
    weights: list | None
    keys: list
    samples: int

    def __len__(self):
        return self.samples


def scheme_of(source):
    """The scheme of a URL or a "pipe:"; None for a path."""
    found = re.match(r"(pipe):|([A-Za-z][A-Za-z0-9+.-]*)://", source)
    return found and (found[1] or found[2].lower())


def open_stream(dataset, metadata, keys, samples, is_resampled, factors):
    """The Stream that `metadata` names; None if it names files alone, which have an index.

    Args:
        dataset: name of the source; "webdataset" has streams.
        metadata: commands, URLs and paths, joined by "::"; braces stand for many of them.
        keys: fields of captions in .json.
        samples: of an epoch, or None.
        is_resampled: whether shards are drawn with replacement.
        factors: text, the weight of a shard of each source, joined by "::"; "" for equal ones.

    Raises InputError for a stream that lacks `samples`, or whose sources or factors are wrong.
    """
    sources = str(metadata).split("::")
    if dataset != "webdataset" or not any(map(scheme_of, sources)):
        if samples or is_resampled or factors:
            raise InputError(
                f"metadata {metadata} is no stream: leave out train-num-samples, dataset-resampled "
                "and upsampling factors, which files do not need"
            )
        return None
    for source in sources:
        if (scheme := scheme_of(source)) and scheme not in SCHEMES:
            raise InputError(
                f"metadata {source}: unknown scheme {scheme}; give an http(s) URL, or pipe:COMMAND "
                "with a command that prints the shard"
            )
    if not samples:
        raise InputError(f"metadata {metadata} is a stream: train-num-samples is missing; give it")
    try:
        import webdataset.tariterators  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"metadata {metadata} is a stream, which needs the package webdataset; install it"
        ) from error
    urls = [alternatives(s) if scheme_of(s) else find_shards(s) for s in sources]
    names = [url for group in urls for url in group]
    if twice := [url for url, number in Counter(names).items() if number > 1]:
        raise InputError(f"metadata {metadata} names {twice[0]} twice; name each shard once")
    weights = weights_of(factors, urls) if is_resampled else None
    if factors and not is_resampled:
        raise InputError(f"upsampling factors {factors} need dataset-resampled; give it as well")
    return Stream(names, weights, list(keys), samples)


def weights_of(factors, urls):
    """The weight of each shard; urls: a list of them for each source."""
    try:
        values = [float(text) for text in factors.split("::")] if factors else [1.0] * len(urls)
    except ValueError:
        values = []
    if len(values) != len(urls) or not all(0 < value < math.inf for value in values):
        raise InputError(
            f"upsampling factors {factors}: give a number above 0 for each of the {len(urls)} "
            "sources, joined by ::"
        )
    return [value for value, group in zip(values, urls, strict=True) for _ in group]


# ---------------------------------------------------------------------------------------------
# One shard


class Lost(Exception):
    """The rest of a shard cannot be read, for this reason."""


class Command:
    """The output of a command as a binary file; a URL is read by curl.

    webdataset's own pipe waits for ever for a command that hangs, leaves the children of its shell
    alone, and loses the output that a failed command has left.
    """

    def __init__(self, url):
        is_pipe = scheme_of(url) == "pipe"
        curl = f"exec curl -fsSL -- {shlex.quote(url)}"
        path = f"exec cat -- {shlex.quote(url)}"
        command = url.removeprefix("pipe:") if is_pipe else curl if scheme_of(url) else path
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "sh", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.poll = select.poll()
        self.poll.register(self.process.stdout, select.POLLIN)
        self.head, self.is_over, self.follower = b"", False, Follower()

    def read(self, size):
        """Up to `size` bytes, none at the end. Raises Lost if it has to wait for too long."""
        if not self.poll.poll(1000 * PATIENCE):
            raise Lost(f"no byte for {PATIENCE:g} s")
        data = self.process.stdout.read(size)
        self.head = self.head or data[:8]
        self.is_over = not data
        self.follower.follow(data)
        return data

    def members(self, is_wanted):
        from webdataset.tariterators import tar_file_iterator

        return tar_file_iterator(self, select_files=is_wanted)

    def finish(self):
        """Raises Lost unless the command succeeds and behind the last member is the end mark."""
        while self.read(CHUNK):
            pass
        if code := self.exit_code():
            raise Lost(f"exit code {code}")
        if self.head.startswith(MAGIC):  # a packed tar has a sum of its own
            return
        if self.follower.damage:
            raise Lost(self.follower.damage)
        if not self.follower.is_over:
            raise Lost("it ends in the middle")

    def exit_code(self):
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Lost(f"no end for {PATIENCE:g} s") from None

    def explain(self):
        """The reason why its tar could not be read."""
        if not self.is_over:
            return "no tar, or a damaged one"
        code = self.exit_code()
        return f"exit code {code}" if code else "it ends in the middle"

    def close(self):
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # stuck storage may keep it from its end
            self.process.wait(1)


def read_pairs(url, keys):
    """Yields (name, bytes of the image, captions) of a shard, or the reason to drop one, a text.

    A pair's members follow one another; a key is a name up to its last dot. Raises Lost, without
    the pair before it, which may be incomplete.
    """
    kinds = (*IMAGES, "txt", *(["json"] if keys else []))

    def ending(name):
        return name.rpartition(".")[2].lower()

    def is_wanted(name):
        return ending(name) in kinds and not os.path.basename(name).startswith(".")

    command = Command(url)
    try:
        members = command.members(is_wanted)
        for key, group in groupby(members, lambda member: member["fname"].rpartition(".")[0]):
            found, repeats = {}, 0
            for member in group:
                kind = ending(member["fname"])
                kind = "image" if kind in IMAGES else kind
                repeats += found.setdefault(kind, member) is not member
            name = f"{url}/{plain_name(key)}"
            if repeats:
                yield f"{name} has {repeats} members of a kind that came before"
            texts = {kind: m["data"] for kind, m in found.items() if kind != "image"}
            try:
                captions, *_ = captions_of(texts, keys)
            except Dropped as reason:
                yield f"{name} is {reason}"
                continue
            image = found.get("image")
            yield (name, image["data"], captions) if image else f"{name} is without an image"
        command.finish()
    except Lost:
        raise
    except DAMAGE as error:
        raise Lost(command.explain()) from error
    finally:
        command.close()


def read_shard(url, keys):
    """As read_pairs, but tries again from the first pair that is not read yet. Raises Lost."""
    done = 0
    for left in reversed(range(RETRIES + 1)):
        try:
            for number, pair in enumerate(read_pairs(url, keys)):
                if number >= done:
                    done = number + 1
                    yield pair
            if not done:
                raise Lost("it holds no sample")
            return
        except Lost as reason:
            if not left:
                raise
            text = f"note: {url} failed after {done} pairs: {reason}; it is tried again"
            print(text, file=sys.stderr, flush=True)
            time.sleep(PAUSE)
