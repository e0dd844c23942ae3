"""The checkpoint file: saved without half-written files, loaded as plain data.

A checkpoint is a dict: epoch, state_dict, optimizer, scaler, best_acc1, args. Those released with
the paper hold an argparse.Namespace, sometimes with a pathlib path, and keys that begin with
"module.", and their optimizer holds a NumPy float. Ours, made by checkpoint_manager.py, hold more,
as plain data. No other class is ever built from a file.
"""

import argparse
import hashlib
import io
import os
import pathlib
import pickle
import re
import zipfile
from collections import Counter
from contextlib import contextmanager

import torch

import utils
from infra.untrusted import SLACK, PlainDtype, first_line, memory_limit, plain_scalar
from utils import InputError

# Names that a checkpoint may hold, and the stand-ins built for them: paths touch no disk, NumPy's
# numbers become Python's. PyTorch builds the others, its own way to write tensors.
STAND_INS = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": PlainDtype,
    "numpy.core.multiarray.scalar": plain_scalar,
    "numpy._core.multiarray.scalar": plain_scalar,  # NumPy 2
}
for module in ("pathlib", "pathlib._local"):  # the latter since Python 3.13
    STAND_INS[f"{module}.PosixPath"] = STAND_INS[f"{module}.PurePosixPath"] = pathlib.PurePosixPath
SAFE_GLOBALS = [(built, name) for name, built in STAND_INS.items()]


TENSOR_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.set|_codecs\.encode|"
    r"torch\.(Size|device)|torch\._utils\._rebuild_(tensor_v[23]|parameter)|"
    r"torch\.(storage\.Untyped|[A-Z]\w+)Storage|torch\.(bool|bfloat16|(float|u?int|complex)\d+\w*)"
)


# The tensors that an optimizer holds for each parameter, in its shape.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}


def save(path, state, verify=lambda path: None):
    """Writes beside `path`, flushes, renames: an interrupted save leaves the old file."""
    utils.write_atomically(path, lambda file: torch.save(state, file), verify)


def check_sums(path):
    """Raises InputError unless every byte of a checkpoint of ours is as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"checkpoint {path} is damaged: {first_line(error)}") from error
    if broken:
        raise InputError(f"checkpoint {path} is damaged: the checksum of {broken} differs")


def verify(path):
    """Raises an error unless a checkpoint that we have just written can be read.

    Unlike load, it bounds no memory: that would bound the training beside it, too.
    """
    check_sums(path)
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# ---------------------------------------------------------------------------------------------
# Resuming


def restore(state, path, parts, check):
    """Restores the objects that a checkpoint was saved from.

    Args:
        state: the checkpoint's dict.
        path: of its file, for errors.
        parts: {key of the dict: object with a state_dict}.
        check: the flags to look at if something does not fit, for errors.

    Raises InputError if something does not fit.
    """
    load_weights(parts["state_dict"], state["state_dict"], path, check)
    missing = {"optimizer", "epoch"} - state.keys()
    if missing:
        raise InputError(f"checkpoint {path} holds no {', '.join(missing)} to resume")
    restore_optimizer(parts["optimizer"], state["optimizer"], path, check)
    for key in parts.keys() - {"state_dict", "optimizer"}:
        if state.get(key):  # a scaler's is empty if the run used none
            try:
                parts[key].load_state_dict(state[key])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"checkpoint {path}: its {key} is of another kind") from error


def check_flags(state, facts, names, path):
    """Raises InputError if a run would resume with other flags or facts than it began with.

    Args:
        state: the checkpoint's dict.
        facts: of the run, by logger.describe_run.
        names: the flags and facts that may not differ.
        path: of the checkpoint, for errors.
    """
    old, new = {**state, **vars(state["args"])}, {**facts, **facts["args"]}
    for name in names:
        if name in old and repr(old[name]) != repr(new[name]):
            flag = f"--{name.replace('_', '-')}" if name in facts["args"] else name
            raise InputError(
                f"checkpoint {path} was trained with {flag} {repr(old[name])[:80]}, not "
                f"{new[name]!r}; give the same, or another output folder"
            )


# Flags that say where a run finds things and how fast it is, not what it learns.
NEUTRAL = {"output_dir", "resume", "root", "metadata", "catalog", "allow_outside_root", "device"}
NEUTRAL |= {"dist_url", "workers", "print_freq", "save_every_minutes", "keep_last", "evaluate"}
NEUTRAL |= {"max_bad_fraction", "skip_nonfinite", "deterministic", "compile", "grad_checkpointing"}
NEUTRAL |= {"activation_budget"}


def describe_changes(state, facts):
    """Notes on flags and the order of samples that a resumed run's checkpoint did not have."""

    def spell(value):
        return repr(list(value) if isinstance(value, tuple) else value)[:80]

    old, new = dict(vars(state["args"])), facts["args"]
    for name, value in new.items():  # older runs gave one text to flags that take several now
        if isinstance(value, list) and isinstance(old.get(name), str):
            old[name] = [old[name]]
    changes = [
        f"--{name.replace('_', '-')} {spell(new[name])} (was {spell(old[name])})"
        for name in new
        if name in old and name not in NEUTRAL and spell(old[name]) != spell(new[name])
    ]
    notes = []
    if changes:
        text = ", ".join(changes)
        notes.append(f"note: it was trained with other flags, those given now apply: {text}")
    if (before := state.get("order", "")) != (now := facts.get("order", "")):
        notes.append(
            f"note: the order of samples was that of {before or 'a set'}, now it is that of "
            f"{now or 'a set'}: in an epoch that was begun, samples may come twice or not at all"
        )
    return notes


def restore_optimizer(optimizer, saved, path, check):
    """Loads moments, step counts and rates; weight decay, betas and eps stay those of the flags.

    Moments take their parameter's layout in memory, which fused AdamW relies on.
    """
    names = MOMENTS[type(optimizer)]
    own = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    try:
        fits = [len(g["params"]) for g in saved["param_groups"]] == [len(g["params"]) for g in own]
        for i, moments in saved["state"].items():  # fused AdamW trusts these shapes
            fits &= torch.is_tensor(moments.get("step", torch.zeros(())))
            fits &= all(params[i].shape == moments[k].shape for k in names)
        for mine, theirs in zip(own, saved["param_groups"], strict=True):
            mine["lr"] = float(theirs["lr"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise InputError(f"checkpoint {path}: its optimizer is of another model; check {check}")
    state = {
        i: moments | {k: torch.empty_like(params[i]).copy_(moments[k]) for k in names}
        for i, moments in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": own})


# ---------------------------------------------------------------------------------------------
# Loading


def file_digest(path):
    """The SHA-256 of a file. Raises InputError if it is absent."""
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {str(path)!r} is absent; check the path")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Nothing:
    """Stands for all that a checkpoint names, while only the names are looked at."""

    def __init__(self, *args):
        pass

    def ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = ignore


class NameCheck(pickle.Unpickler):
    """Goes through a pickle of a checkpoint and checks the names in it, but builds nothing.

    PyTorch's own unpickler, which comes after it, allows more than a checkpoint needs, and does not
    always name the culprit. size: the file's; no storage of a tensor can hold more.
    """

    def __init__(self, file, size):
        super().__init__(file)
        self.size = size

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name not in STAND_INS and not TENSOR_NAMES.fullmatch(name):
            name = repr(name)[:120]
            raise InputError(f"is refused: it names {name}, which is no part of a checkpoint")
        return Nothing

    def persistent_load(self, identifier):
        kind, *_ = identifier if isinstance(identifier, tuple) and identifier else [identifier]
        if kind != "storage" or len(identifier) not in (5, 6):
            raise InputError(f"is refused: its persistent id {repr(kind)[:80]} is no tensor's")
        if not isinstance(numel := identifier[4], int) or not 0 <= numel <= self.size:
            raise InputError(f"is refused: one of its tensors claims {repr(numel)[:80]} numbers")
        return Nothing()


def check_names(members):
    """Raises InputError for a zip with two members of one name, or one outside of a folder."""
    names = Counter(m.filename for m in members)
    for name in names:
        text = repr(name)[:120]
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"is refused: its member {text} leads out of the archive")
        if names[name] > 1:
            raise InputError(f"is refused: it has two members {text}")


def check_members(members, size):
    """Raises InputError for a zip that claims more than its size, or is no checkpoint's.

    torch.save packs nothing, so that a sound one never unpacks to more than itself.
    """
    if (unpacked := sum(m.file_size for m in members)) > size:
        raise InputError(f"is refused: it claims to unpack to {unpacked} bytes")
    check_names(members)
    for name in (m.filename for m in members):
        if name.endswith(".pkl") and name.partition("/")[2] != "data.pkl":  # TorchScript's
            raise InputError(
                f"is refused: its member {repr(name)[:120]} is no part of a checkpoint"
            )


def check_content(path):
    """Raises InputError if a checkpoint names or claims things that none can hold."""
    if foreign := utils.foreign_kind(path):
        raise InputError(foreign)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # by which torch.load knows it
        file.seek(0)
        if not is_zip:  # before PyTorch 1.6: five pickles, of which the fourth is the dict
            for _ in range(5):
                NameCheck(file, size).load()
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            check_members(members, size)
            for member in members:
                if member.filename.endswith(".pkl"):
                    NameCheck(io.BytesIO(archive.read(member)), size).load()


@contextmanager
def distrusted(path, kind="checkpoint"):
    """Every failure within is an InputError that names the file; memory is bounded by its size.

    kind: of the file, for errors.
    """
    try:
        with memory_limit(2 * os.path.getsize(path) + SLACK):
            yield
    except InputError as error:
        raise InputError(f"{kind} {path} {error}") from error
    except PermissionError as error:
        raise InputError(f"{kind} {path}: {error.strerror}; make it readable") from error
    except pickle.UnpicklingError as error:
        # PyTorch wraps the reason in advice to load the file unsafely; the reason is the context.
        reason = first_line(error.__context__ or error).split(" was not an allowed")[0]
        raise InputError(f"{kind} {path} is refused, it is not plain data: {reason}") from error
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)[:200]  # it may quote the file at length
        if isinstance(error, MemoryError) or "allocate memory" in reason:
            reason = "it claims more memory than its size allows"
        raise InputError(f"{kind} {path} is damaged: {reason}") from error


def plain_dict(value):
    """A plain copy of a dict, as a hostile OrderedDict may hide its methods; None for others."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


def check_kinds(state, path):
    """Raises InputError if fields of a checkpoint's dict are of another kind than users expect."""
    epoch, best = state.get("epoch", 0), state.get("best_acc1", 0.0)
    if not isinstance(epoch, int) or not 0 <= epoch < 2**31:
        raise InputError(f"checkpoint {path}: its epoch is {repr(epoch)[:80]}, not a count")
    if not isinstance(best, (int, float)):
        raise InputError(f"checkpoint {path}: its best_acc1 is {repr(best)[:80]}, not a number")
    check_claims(state["state_dict"], path)


def check_claims(weights, path):
    """Raises InputError if a tensor of a file claims more bytes than the file has."""
    size = os.path.getsize(path)
    for key, value in weights.items():
        if value.numel() * value.element_size() > size:
            claim = f"{key!r} claims {value.numel()} numbers"
            raise InputError(f"checkpoint {path} is refused: {claim}")


def plain_keys(weights, name):
    """The dict with its keys by plain_key; `name` is the file's, if two of them fall together."""
    plain = {plain_key(key): value for key, value in weights.items()}
    if len(plain) < len(weights):
        raise InputError(f"{name}: it holds weights twice, with and without module.")
    return plain


def plain_key(key):
    """A weight's name without the words of wrappers: DDP's first one, torch.compile's anywhere."""
    return re.sub(r"(^|(?<=\.))_orig_mod\.", "", key).removeprefix("module.")


def check_regular(path, kind="checkpoint"):
    if not os.path.isfile(path):
        fault = "is no regular file" if os.path.exists(path) else "is absent"
        raise InputError(f"{kind} {str(path)!r} {fault}; check the path")


def load(path):
    """The checkpoint's dict on the CPU, args as a Namespace, keys by plain_key.

    Raises InputError if the file is absent, is no checkpoint, or holds anything but plain data.
    """
    check_regular(path)
    with distrusted(path):
        check_content(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    state = plain_dict(state)
    if state is None or not {"state_dict", "args"} <= state.keys():
        raise InputError(f"{path} is no checkpoint of a training run: state_dict or args is absent")
    args, weights = state["args"], plain_dict(state["state_dict"])
    args = plain_dict(vars(args) if isinstance(args, argparse.Namespace) else args)
    is_named = all(d is not None and all(isinstance(k, str) for k in d) for d in (args, weights))
    if not is_named or not all(map(torch.is_tensor, weights.values())):
        raise InputError(f"checkpoint {path}: its state_dict or args is of another kind")
    weights = plain_keys(weights, f"checkpoint {path}")
    namespace = argparse.Namespace()
    vars(namespace).update(args)  # which may be named as Namespace's own parameters
    state |= {"args": namespace, "state_dict": weights}
    check_kinds(state, path)
    return state


def mismatches(own, state_dict):
    """{fault: keys} of a state dict and that of a model of ours; each has keys -> tensors."""
    faults = {
        "missing": [k for k in own if k not in state_dict],
        "unknown": [k for k in state_dict if k not in own],
        "of another shape": [
            k for k in own if k in state_dict and own[k].shape != state_dict[k].shape
        ],
    }
    return {fault: keys for fault, keys in faults.items() if keys}


def describe_mismatches(faults):
    """The first three keys of each fault."""
    return "; ".join(
        f"{len(keys)} keys {fault}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}"
        for fault, keys in faults.items()
    )


def load_weights(model, state_dict, path, check):
    """Strict loading. Raises InputError naming keys that are missing, surplus or of other shape,
    and the flag to `check`.
    """
    if faults := mismatches(model.state_dict(), state_dict):
        text = describe_mismatches(faults)
        raise InputError(f"checkpoint {path} is of another model ({text}); check {check}")
    model.load_state_dict(state_dict)
