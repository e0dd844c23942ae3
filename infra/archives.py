"""Images in folders, zips and tars: read_file returns the bytes of one, safely and fast.

A path may lead into an archive ("images/12/345.zip/678.jpg"). Archives stay open between reads.
"""

import os
import re
import struct
import zipfile
import zlib
from functools import cached_property, lru_cache

from infra.tars import BLOCK, is_header_of
from utils import InputError, regular_file

LARGE = 2**18  # bytes of a zip's directory, of some 4,000 images
MAX_IMAGE = 2**28  # bytes of an image, compressed or not


def open_bytes(path):
    return open(path, "rb", buffering=0, opener=regular_file)


# ---------------------------------------------------------------------------------------------
# One kind of archive each


class UnusualZip(Exception):
    """Raised for a zip with features that only zipfile knows."""


class Zip:
    """Reads members of a zip by searching its directory for their names, without parsing it.

    An archive of a thousand images opens in a fraction of zipfile's time. This matters for
    YFCC15M, which has far more archives than can stay open.
    """

    ENTRY = struct.Struct("<4s6H3L5H2L")  # an entry of the directory, up to the name

    def __init__(self, path):
        self.file = open_bytes(path)
        self.size = os.fstat(self.file.fileno()).st_size
        start = max(self.size - 65_557, 0)  # the end record and the longest comment
        tail = self.pread(65_557, start)
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) - end < 22:
            raise zipfile.BadZipFile("it is no zip, or its end is missing")
        length, offset = struct.unpack_from("<LL", tail, end + 12)
        if offset + length != start + end:
            raise UnusualZip
        self.directory = self.pread(length, offset)

    def pread(self, length, offset):
        return os.pread(self.file.fileno(), min(length, self.size), offset)

    @cached_property
    def places(self):
        """{name: place of its entry}, of a directory that is too large to search for each name."""
        places, at = {}, 0
        while at + self.ENTRY.size <= len(self.directory):
            entry = self.ENTRY.unpack_from(self.directory, at)
            if entry[0] != b"PK\1\2":
                break
            start = at + self.ENTRY.size
            places.setdefault(self.directory[start : start + entry[10]], at)
            at = start + sum(entry[10:13])
        return places

    def find(self, name):
        """The directory's entry of a member; `name` in bytes. Raises KeyError if absent."""
        if len(self.directory) > LARGE:
            if name not in self.places:
                raise KeyError(f"there is no item named {name.decode()!r} in the archive")
            return self.ENTRY.unpack_from(self.directory, self.places[name])
        at = -1
        while (at := self.directory.find(name, at + 1)) >= 0:
            if at >= self.ENTRY.size:
                entry = self.ENTRY.unpack_from(self.directory, at - self.ENTRY.size)
                if entry[0] == b"PK\1\2" and entry[10] == len(name):
                    return entry
        raise KeyError(f"there is no item named {name.decode()!r} in the archive")

    def read(self, name):
        entry = self.find(name.encode())
        flags, method, crc, packed, unpacked, offset = (entry[i] for i in (3, 4, 7, 8, 9, 16))
        if flags & 1 or method not in (0, 8) or 0xFFFFFFFF in (packed, unpacked, offset):
            raise UnusualZip
        if unpacked > MAX_IMAGE:
            raise ValueError(f"it unpacks to {unpacked} bytes, more than an image has")
        head = self.pread(30, offset)
        if len(head) < 30 or head[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("it is not where the archive's directory says")
        data = self.pread(packed, offset + 30 + sum(struct.unpack_from("<HH", head, 26)))
        if method == 8:
            data = zlib.decompressobj(-15).decompress(data, unpacked + 1)
        if len(data) != unpacked or zlib.crc32(data) != crc:
            raise zipfile.BadZipFile("it is damaged: its checksum differs")
        return data


class SlowZip:
    """Reads members by zipfile: other methods and zip64; encryption is an error there."""

    def __init__(self, path):
        self.file = zipfile.ZipFile(path)

    def read(self, name):
        if self.file.getinfo(name).file_size > MAX_IMAGE:
            raise ValueError("it unpacks to more bytes than an image has")
        return self.file.read(name)


@lru_cache(maxsize=128)
def open_archive(kind, path, process):
    """An archive that stays open; `process` keeps forked workers from sharing a handle."""
    return kind(path)


def read_zip(path, name):
    try:
        return open_archive(Zip, path, os.getpid()).read(name)
    except UnusualZip:
        return open_archive(SlowZip, path, os.getpid()).read(name)


def read_tar(path, name):
    """A member of an uncompressed tar, found by its place: `name` ends on "@OFFSET+SIZE".

    Its header is read with it, as the tar may have changed since its members were looked up.
    """
    place = re.fullmatch(r"(.*)@(\d+)\+(\d+)", name, re.DOTALL)
    if not place:
        raise ValueError("its place in the tar, @OFFSET+SIZE, is missing from its name")
    offset, size = int(place[2]), int(place[3])
    if size > MAX_IMAGE:
        raise ValueError(f"it has {size} bytes, more than an image has")
    file = open_archive(open_bytes, path, os.getpid())
    data = os.pread(file.fileno(), BLOCK + size, max(offset - BLOCK, 0))
    if len(data) != BLOCK + size:
        raise EOFError("the tar ends before it")
    if not is_header_of(data[:BLOCK], place[1], size):
        raise ValueError("the tar has changed since it was indexed; index it again")
    return data[BLOCK:]


# ---------------------------------------------------------------------------------------------
# Any path

READERS = {".zip": read_zip, ".tar": read_tar}
MARK = re.compile(r"(?<=\.zip|\.tar)/")


def places_in_archives(path):
    """Yields (archive, name within it) for each part of a path that may be an archive."""
    for mark in MARK.finditer(path):
        yield path[: mark.start()], path[mark.end() :]


def file_of(path):
    """The file that holds an image: its archive, or itself; a folder may be called x.zip."""
    archives = (archive for archive, _ in places_in_archives(path))
    return next((archive for archive in archives if not os.path.isdir(archive)), path)


def read_plain(path):
    with open_bytes(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_IMAGE:
            raise ValueError(f"it has over {MAX_IMAGE} bytes")
        return file.read()


def read_file(root, path):
    """The bytes of root/path, which may lead into an archive ("images/12/345.zip/678.jpg").

    Raises InputError with the path if the file is absent, damaged or too large.
    """
    try:
        for archive, name in places_in_archives(path):
            archive = os.path.join(root, archive)
            try:
                return READERS[archive[-4:]](archive, name)
            except (OSError, ValueError):
                if not os.path.isdir(archive):
                    raise
        return read_plain(os.path.join(root, path))
    except OSError as error:
        reason = error.strerror or error
    except (LookupError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        reason = error.args[0] if error.args else error
    except (zlib.error, struct.error, NotImplementedError, OverflowError) as error:
        reason = error
    raise InputError(f"image {root}/{path}: {reason}; check the path and the file")


def has_file(root, path):
    """Whether root/path exists; a member of an archive must also be readable."""
    if not MARK.search(path):
        return os.path.isfile(os.path.join(root, path))
    try:
        read_file(root, path)
    except InputError:
        return False
    return True
