"""Members of a tar by their headers: names and places, without a byte of their data.

tarfile does the same, and knows owners, times and links as well, at several times the cost. A shard
has tens of thousands of headers, so they are read here. Nothing in a header is believed beyond the
size of the file.
"""

import os
import zlib
from typing import NamedTuple

BLOCK = 512  # bytes that headers and data are multiples of
WINDOW = 2**13  # bytes read at once: the headers and captions between two images
MAX_NAME = 2**20  # bytes of a pax header or a long name
MAX_PADDING = 2**20  # bytes of zeros at the end; most write up to 10 KB

REGULAR, WITHOUT_DATA = b"07\0", b"123456"  # types: files; links, devices, folders, pipes


class Damage(Exception):
    """Raised at the place of a tar that cannot be read any further; members before it are whole."""


class Member(NamedTuple):
    name: str  # as in the tar, hostile or not; bytes that are no UTF-8 are lone surrogates
    offset: int  # of the data
    size: int  # of the data, in bytes


def text_of(field):
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def number_of(field):
    """A header's number: octal text, or binary if it is too large for that."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def is_sound(header):
    """Whether the sum of a header's bytes, blanks in the place of the sum, is the stated one.

    The low half of Adler's checksum is that sum plus 1, modulo 65521, in a tenth of sum()'s time.
    """
    if len(header) < BLOCK:
        return False
    try:
        total = number_of(header[148:156]) + sum(header[148:156]) - 8 * ord(" ")
    except ValueError:
        return False
    return zlib.adler32(header) & 0xFFFF == (1 + total) % 65521


def is_header_of(header, name, size):
    """Whether a header is that of a member, by its size, and by its name unless that is long."""
    if not is_sound(header) or number_of(header[124:136]) != size:
        return False
    # Behind other headers the name of a long one, or one with accents, is cut or spelled anew.
    is_told = name.isascii() and len(name) < 90
    return not is_told or os.path.basename(text_of(header[:100])) == os.path.basename(name)


def pax_records(data):
    """{keyword: value} of a pax header, in bytes. Raises ValueError if it is malformed."""
    records, at = {}, 0
    while at < len(data):
        length, blank, _ = data[at : at + 24].partition(b" ")
        end = at + int(length)
        if not blank or end <= at + len(length):
            raise ValueError("a pax header of another form")
        key, _, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


class Tar:
    """A tar that is read from front to back, by few and small reads.

    file: an open binary file without a buffer.
    """

    def __init__(self, file):
        self.descriptor = file.fileno()
        self.size = os.fstat(self.descriptor).st_size
        self.window, self.start = b"", 0

    def read(self, offset, size):
        """Bytes at a place; fewer if the file ends before."""
        at = offset - self.start
        if not 0 <= at <= at + size <= len(self.window):
            self.window = os.pread(self.descriptor, max(size, WINDOW), offset)
            self.start, at = offset, 0
        return self.window[at : at + size]

    def members(self):
        """Yields the Member of each regular file. Raises Damage."""
        at, pax, long_name = 0, {}, None
        while True:
            header = self.read(at, BLOCK)
            if not header.strip(b"\0") and len(header) == BLOCK:
                self.check_end(at)
                return
            if len(header) < BLOCK:
                mark = "its end mark is missing" if at else "it is empty"
                raise Damage("it ends in the middle" if header else mark)
            if not is_sound(header):
                raise Damage(f"its header at byte {at} is damaged")
            try:
                size, kind = number_of(header[124:136]), header[156:157]
                size = int(pax.get(b"size", size))
            except ValueError:
                raise Damage(f"its header at byte {at} is damaged") from None
            offset = at + BLOCK
            if kind == b"S":
                offset = self.behind_sparse_map(header, offset)
            at = offset if kind in WITHOUT_DATA else offset + -(-size // BLOCK) * BLOCK
            if kind not in WITHOUT_DATA and not 0 <= size <= self.size - offset:
                raise Damage("it ends in the middle")
            if kind == b"x":
                pax = self.read_pax(offset, size)
            elif kind == b"L":
                long_name = text_of(self.read(offset, min(size, MAX_NAME)))
            elif kind not in b"gK":  # a member: what was said in advance is used up
                name = long_name or self.name_of(header, pax)
                is_sparse = pax and any(key.startswith(b"GNU.sparse") for key in pax)
                pax, long_name = {}, None
                if kind in REGULAR and not is_sparse and not name.endswith("/"):
                    yield Member(name, offset, size)

    def check_end(self, at):
        """Raises Damage if bytes follow the end mark: a tar appended by cat, or a hole of zeros."""
        rest = self.read(at, min(self.size - at, MAX_PADDING))
        if len(rest.strip(b"\0")) or self.size - at > MAX_PADDING:
            raise Damage(f"bytes follow its end at {at}: zeros within it, or another tar")

    def read_pax(self, offset, size):
        try:
            return pax_records(self.read(offset, min(size, MAX_NAME)))
        except ValueError:
            raise Damage(f"its pax header at byte {offset - BLOCK} is damaged") from None

    @staticmethod
    def name_of(header, pax):
        if b"path" in pax:
            return pax[b"path"].decode(errors="surrogateescape")
        prefix = text_of(header[345:500]) if header[257:263] == b"ustar\0" else ""
        return f"{prefix}/{text_of(header[:100])}" if prefix else text_of(header[:100])

    def behind_sparse_map(self, header, offset):
        """The place behind the blocks that continue the map of a sparse file of old GNU tars."""
        more = header[482]
        while more:
            block = self.read(offset, BLOCK)
            if len(block) < BLOCK:
                raise Damage("it ends in the middle")
            more, offset = block[504], offset + BLOCK
        return offset


class Follower:
    """Follows the headers of a tar as its bytes pass by to another reader.

    Readers of streams take a damaged header for the end of the tar.

    Attributes:
        is_over: bool, whether the end mark has passed.
        damage: the reason why members are out of reach; None without.
    """

    def __init__(self):
        self.header, self.left = b"", 0  # a header's bytes so far; bytes of data before the next
        self.is_over, self.damage = False, None

    def follow(self, data):
        at = 0
        while at < len(data) and not (self.is_over or self.damage):
            passed = min(self.left, len(data) - at)
            self.left, at = self.left - passed, at + passed
            part = data[at : at + BLOCK - len(self.header)]
            self.header, at = self.header + part, at + len(part)
            if len(self.header) == BLOCK:
                self.pass_header(self.header)
                self.header = b""
        if self.is_over and data[at:].strip(b"\0"):
            self.damage = "there is data behind its end mark"

    def pass_header(self, header):
        if not header.strip(b"\0"):
            self.is_over = True
        elif not is_sound(header):
            self.damage = "a header is damaged"
        elif header[156:157] not in WITHOUT_DATA:
            self.left = -(-number_of(header[124:136]) // BLOCK) * BLOCK
