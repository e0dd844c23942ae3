"""Any file of weights as plain tensors: checkpoints, state dicts, safetensors, TorchScript.

Nothing in a file is ever executed. The tensors are views of the file in memory, which is copied
nowhere but for numbers of half precision: while they are in use the file may be replaced, but not
be written to.
"""

import mmap
import os
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open

import utils
from infra import checkpoint
from infra.tensor_pickles import HALVES, PLAIN, Module, Tensor, read_pickled, view
from infra.untrusted import SLACK
from utils import InputError, regular_file


@dataclass
class Content:
    """The plain data of a file of weights.

    tensors: {key: CPU tensor}, keys by checkpoint.plain_key, numbers of half precision as float32.
    state: the other entries of a training run's checkpoint (args as a Namespace, epoch ...); {} for
        all other files.
    is_torchscript: whether the file is an archive of torch.jit.save, as OpenAI's are.
    """

    tensors: dict
    state: dict
    is_torchscript: bool = False


def read(path):
    """The Content of a file of weights of any kind, told by the file's bytes and not by its name.

    The kinds: checkpoints of training runs (ours and SLIP's), state dicts by torch.save, bare or in
    an entry of WRAPS, safetensors, and TorchScript archives.

    Raises InputError if the file is absent, unsafe, damaged, or holds no weights.
    """
    name, size = f"weights {path}", check_size(path)
    with checkpoint.distrusted(path, "weights"), open(path, "rb", opener=regular_file) as file:
        is_safetensors = file.read(9)[5:] == b"\0\0\0{"  # a length of below 2**40, then JSON
        if not is_safetensors and (foreign := utils.foreign_kind(path)):
            raise InputError(foreign)
        if is_safetensors:
            root, tensors = None, read_safetensors(path, size)
        else:
            root = read_pickled(file, size)
            tensors = {} if is_run(root) else find_weights(root, file)
    if is_run(root):
        state = checkpoint.load(path)
        tensors = state.pop("state_dict")
    else:
        state, tensors = {}, checkpoint.plain_keys(tensors, name)
    if not tensors:
        raise InputError(f"{name} holds no weights: none of its entries is a tensor")
    return Content(in_single(tensors, name, size), state, isinstance(root, Module))


def averaged(content, path):
    """The Content with the average of a run's weights in their place.

    Raises InputError if the file holds none.
    """
    found = checkpoint.plain_dict(content.state.get("ema")) or {}
    if not found or not all(isinstance(k, str) and torch.is_tensor(x) for k, x in found.items()):
        raise InputError("it holds no averaged weights, only its weights")
    checkpoint.check_claims(found, path)
    name = f"weights {path}"
    found = in_single(checkpoint.plain_keys(found, name), name, os.path.getsize(path))
    return replace(content, tensors=found)


def check_size(path):
    checkpoint.check_regular(path, "weights")
    return os.path.getsize(path)


def is_run(root):
    """Whether an object is a training run's checkpoint, as checkpoint.load takes it."""
    return isinstance(root, dict) and {"state_dict", "args"} <= root.keys()


def in_single(tensors, name, size):
    """Numbers of half precision as float32; many tensors may be views of the same ones."""
    for key, tensor in tensors.items():
        if tensor.dtype not in PLAIN:
            fault = f"{repr(key)[:80]} is of {tensor.dtype}; quantised tensors are not read"
            raise InputError(f"{name}: {fault}")
    if 4 * sum(t.numel() for t in tensors.values() if t.dtype in HALVES) > 4 * size + SLACK:
        raise InputError(f"{name} is refused: its weights claim more memory than its size allows")
    return {key: t.float() if t.dtype in HALVES else t for key, t in tensors.items()}


# ---------------------------------------------------------------------------------------------
# safetensors

LONGEST = 2**22  # bytes of a header, some 40,000 tensors; a limit of memory ends its parser badly


def read_safetensors(path, size):
    """{key: tensor} of a .safetensors file, which safetensors checks and maps into memory."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise InputError(f"is damaged: its header claims {length} bytes, the file has {size}")
    if length > LONGEST:
        raise InputError(f"is refused: its header claims {length} bytes, more than {LONGEST}")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


# ---------------------------------------------------------------------------------------------
# Weights among the entries

WRAPS = ("state_dict", "model", "teacher", "student")  # of MoCo and timm, MAE, DINO


def find_weights(root, file):
    """{key: tensor} of an object that was read with stand-ins."""
    found = module_weights(root) if isinstance(root, Module) else dict_weights(root)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {key: view(key, tensor, mapped) for key, tensor in found.items()}


def dict_weights(root, depth=3):
    """{key: Tensor} of a dict, or of the first of WRAPS within it that holds tensors."""
    if not isinstance(root, dict) or not depth:
        return {}
    for wrap in WRAPS:
        if found := dict_weights(root.get(wrap), depth - 1):
            return found
    return {k: v for k, v in root.items() if isinstance(k, str) and isinstance(v, Tensor)}


MOST, DEEPEST = 10**6, 1000  # attributes of all modules; letters of a key


def module_weights(root):
    """{dotted path: Tensor} of the parameters and buffers of a TorchScript module.

    If it was scripted and not traced, other tensors that are attributes are among them: the code
    alone tells them apart. A module may occur at several places, so that a few bytes could stand
    for endless paths.
    """
    found, waiting, seen = {}, [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1 + len(module.attributes)
        if seen > MOST or len(prefix) > DEEPEST:
            raise InputError("is refused: its modules hold each other without an end")
        for name, value in module.attributes.items():
            if not isinstance(value, (Module, Tensor)):
                continue
            if not isinstance(name, str) or len(name) > DEEPEST:
                raise InputError(f"is refused: a module's attribute is {repr(name)[:80]}")
            if isinstance(value, Module):
                waiting.append((f"{prefix}{name}.", value))
            elif found.setdefault(f"{prefix}{name}", value) is not value:
                raise InputError(f"is refused: it holds {repr(prefix + name)[:80]} twice")
    return found
