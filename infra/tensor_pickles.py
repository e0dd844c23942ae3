"""PyTorch's pickles, read into stand-ins: files by torch.save and by torch.jit.save.

No class of a file is built and no code of it runs. A tensor's stand-in holds the place of its
numbers in the file, and view() makes it a tensor: a view of the file in memory, without a copy.
"""

import math
import os
import re
import struct
import zipfile

import torch

from infra import checkpoint
from infra.checkpoint import Nothing
from utils import InputError

# ---------------------------------------------------------------------------------------------
# Stand-ins for all that a pickle may name. Each takes any state and forgets it, by __setstate__,
# without which the state would become attributes.


class Table(dict):
    """Stands for an OrderedDict."""

    def __setstate__(self, state):
        pass


class Given(Nothing):
    """Stands for a function that returns its first argument."""

    def __new__(cls, value=None, *args):
        return value


class Kind(Nothing):
    """Stands for a dtype, and for the kind of a storage."""

    def __init__(self, dtype):
        self.dtype = dtype


class Storage(Nothing):
    """The numbers of one tensor or several; they begin at byte `start` of the file."""

    def __init__(self, dtype, numel, start=None):
        self.dtype, self.numel, self.start = dtype, numel, start
        self.length, self.data = numel * dtype.itemsize, None

    def bytes(self, mapped):
        """Its bytes as a tensor, once: tensors that share their numbers in the file still do."""
        if self.data is None:
            start = self.start
            if start % 16:  # only in old files; the widest number has 16 bytes
                mapped, start = bytearray(memoryview(mapped)[start : start + self.length]), 0
            self.data = torch.frombuffer(mapped, dtype=torch.uint8, count=self.length, offset=start)
        return self.data


class Tensor(Nothing):
    """A tensor in a file, by the arguments of PyTorch's _rebuild_tensor_v2 and v3."""

    def __init__(self, storage, offset, shape, stride, requires_grad, hooks, dtype=None, *rest):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.dtype = dtype.dtype if isinstance(dtype, Kind) else None  # v2 has metadata there


class Module(Nothing):
    """A module of a TorchScript archive: its attributes."""

    attributes = {}  # noqa: RUF012

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


HALVES = (torch.float16, torch.bfloat16)
PLAIN = (torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32)
PLAIN += (torch.uint64, torch.int64, *HALVES, torch.float32, torch.float64)
PLAIN += (torch.complex64, torch.complex128)

STORAGES = {"Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16}
STORAGES |= {"Int": torch.int32, "Long": torch.int64, "Half": torch.float16}
STORAGES |= {"BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64}
STORAGES |= {"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}

STAND_INS = {f"torch.{name}Storage": Kind(dtype) for name, dtype in STORAGES.items()}
STAND_INS |= {str(dtype): Kind(dtype) for dtype in PLAIN}
STAND_INS |= {
    "torch.storage.UntypedStorage": Kind(torch.uint8),
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_tensor_v3": Tensor,
    "torch._utils._rebuild_parameter": Given,
    "torch.Size": Given,
    "collections.OrderedDict": Table,
    "torch.jit._pickle.restore_type_tag": Given,
}
STAND_INS |= {
    f"torch.jit._pickle.build_{kind}list": Given for kind in ("int", "bool", "double", "tensor")
}
MODULE = re.compile(r"__torch__(?!\.torch\.classes\.)[\w.]+")  # those are C++ classes of PyTorch

# Beside the weights, in files of other trainers: plain data as checkpoints of ours hold it, and
# objects of these libraries, which are left out.
LEFT_OUT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|yacs|fvcore|mmcv|mmengine)\.[\w.]+|"
    r"collections\.(defaultdict|deque|Counter)|typing\.\w+|"
    r"(builtins|__builtin__)\.(set|dict|list|tuple|int|float|str|bool)|datetime\.\w+|"
    r"numpy\.(ndarray|_?core\.multiarray\._reconstruct)|_codecs\.encode|torch\.device|"
    + "|".join(map(re.escape, checkpoint.STAND_INS))
)
NOT_PLAIN = re.compile(
    r"torch\._utils\._rebuild_(qtensor|sparse\w*|nested\w*|wrapper\w*|meta\w*|device\w*)|"
    r"torch\.(Q\w+Storage|q\w+|float8\w+|sparse\w*|per_\w+)|__torch__\.torch\.classes\..*"
)


class Unpickler(checkpoint.NameCheck):
    """Reads a pickle of PyTorch's into stand-ins.

    place: called with (key, dtype, number of numbers) for each storage, and returns its Storage.
    """

    def __init__(self, file, size, place):
        super().__init__(file, size)
        self.place = place

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name in STAND_INS:
            return STAND_INS[name]
        if MODULE.fullmatch(name):
            return Module
        if LEFT_OUT.fullmatch(name):
            return Nothing
        if NOT_PLAIN.fullmatch(name):
            raise InputError(f"names {name[:120]}; quantised and sparse tensors are not read")
        name = repr(name)[:120]
        raise InputError(f"is refused: it names {name}, which is no part of a file of weights")

    def persistent_load(self, identifier):
        super().persistent_load(identifier)  # which checks it
        _, kind, key, _, numel, *rest = identifier
        if not isinstance(kind, Kind) or not isinstance(key, str) or rest not in ([], [None]):
            raise InputError("is refused: one of its storages is of an unknown kind")
        return self.place(key, kind.dtype, numel)


# ---------------------------------------------------------------------------------------------
# Files of pickles


def read_pickled(file, size):
    """The object in a file by torch.save or torch.jit.save, with stand-ins."""
    file.seek(0)
    is_zip = file.read(4) == b"PK\3\4"
    file.seek(0)
    return read_zip(file, size) if is_zip else read_old(file, size)


def read_zip(file, size):
    """Of data.pkl; the code in an archive is never looked at."""
    with zipfile.ZipFile(file) as archive:
        checkpoint.check_names(archive.infolist())
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"is refused: it is a zip with {len(roots)} members data.pkl, not one")
        [root] = roots
        if f"{root}byteorder" in archive.namelist():
            start, length = place_of(archive, f"{root}byteorder", size)
            file.seek(start)
            check_order(file.read(min(length, 16)) != b"big")

        def place(key, dtype, numel):
            start, length = place_of(archive, f"{root}data/{key}", size)
            if length != numel * dtype.itemsize:
                raise false_claim(key, numel)
            return Storage(dtype, numel, start)

        def load(name, place):
            place_of(archive, f"{root}{name}", size)
            with archive.open(f"{root}{name}") as pickled:
                return Unpickler(pickled, size, place).load()

        if f"{root}constants.pkl" in archive.namelist():  # of the code; it is only checked
            load("constants.pkl", lambda key, dtype, numel: None)
        return load("data.pkl", place)


def place_of(archive, name, size):
    """(first byte, length) of a member, which may not be packed."""
    member, text = archive.getinfo(name), repr(name)[:120]
    archive.fp.seek(member.header_offset)
    head = archive.fp.read(30)
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise InputError(f"is damaged: member {text} is not at its place")
    start = member.header_offset + 30 + sum(struct.unpack_from("<HH", head, 26))
    if member.compress_type or member.flag_bits & 1 or member.file_size != member.compress_size:
        raise InputError(f"is refused: member {text} is packed, as PyTorch never does")
    if start + member.file_size > size:
        raise InputError(f"is damaged: member {text} ends behind the end of the file")
    return start, member.file_size


def false_claim(key, numel):
    return InputError(f"is refused: storage {repr(key)[:80]} claims {numel} numbers")


def check_order(is_little):
    if not is_little:
        raise InputError("was written by a big-endian machine; save it anew on another")


MAGIC = 0x1950A86A20F9469CFC6C


def read_old(file, size):
    """Of PyTorch before 1.6: five pickles, of which the fourth is the dict; then the storages."""
    storages = {}

    def place(key, dtype, numel):
        storage = storages.setdefault(key, Storage(dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel) or numel * dtype.itemsize > size:
            raise false_claim(key, numel)
        return storage

    def load():
        return Unpickler(file, size, place).load()

    if load() != MAGIC:
        raise InputError("is no file of weights: it is neither PyTorch's nor safetensors'")
    _, system, root, keys = load(), load(), load(), load()
    check_order(not isinstance(system, dict) or system.get("little_endian", True))
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        storage = storages[key]
        if storage.numel != numel:
            raise false_claim(key, numel)
        storage.start = file.tell()
        if file.seek(storage.length, os.SEEK_CUR) > size:
            raise InputError(f"is damaged: storage {key!r} ends behind the end of the file")
    return root


def view(key, tensor, mapped):
    """A Tensor's numbers in the mapped file, as PyTorch's tensor.

    Raises InputError unless all of them lie within its storage.
    """
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    numbers = (tensor.offset, *shape, *stride)
    is_sound = isinstance(storage, Storage) and storage.start is not None
    is_sound &= len(shape) == len(stride) <= 64
    if not is_sound or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise InputError(f"is refused: {repr(key)[:80]} is no plain tensor")
    dtype, numel = tensor.dtype or storage.dtype, math.prod(shape)
    if not numel:
        return torch.empty(shape, dtype=dtype)
    end = 1 + tensor.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = dtype.itemsize
    if end * size > storage.length or numel * size > len(mapped):  # a number may stand for many
        raise InputError(f"is refused: {repr(key)[:80]} claims {numel} numbers beyond its storage")
    flat = storage.bytes(mapped)[: storage.length // size * size].view(dtype)
    return flat.as_strided(shape, stride, tensor.offset)
