"""Checkpoints: ours, those released with the paper, and files that must not be trusted."""

import argparse
import collections
import os
import pathlib
import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch
from helpers import LFS

import optimization
import pretrained
from infra import checkpoint
from models import create_model
from utils import InputError


def released_args(**values):
    """As in a checkpoint from a Slurm job of the archived code."""
    args = argparse.Namespace(model="SLIP_NANO8", ssl_mlp_dim=32, ssl_emb_dim=16, **values)
    args.output_dir = pathlib.PosixPath("/checkpoint/user/run")
    return args


def save_released(path, prefix="module.", **more):
    torch.manual_seed(1)
    model = create_model("SLIP_NANO8", 32, 16)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(optimization.param_groups(model, 0.1), foreach=False)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = np.float64(1e-5)  # the archived code takes it from a NumPy schedule
    state = {"epoch": 25, "state_dict": collections.OrderedDict(state), "best_acc1": 42.8}
    state |= {"args": released_args(), "optimizer": optimizer.state_dict(), "scaler": {}}
    for group in state["optimizer"]["param_groups"]:  # PyTorch 1.10 knew no more than these
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}:
            del group[key]
    torch.save({**state, **more}, path)
    return model


def as_numpy_1(path):
    """Renames what NumPy 2 pickles to what NumPy 1 did, within PyTorch's zip."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("age", [as_numpy_1, lambda path: None])
def test_released_checkpoints_load(tmp_path, prefix, age):
    expected = save_released(tmp_path / "c.pt", prefix)
    age(tmp_path / "c.pt")
    group = checkpoint.load(tmp_path / "c.pt")["optimizer"]["param_groups"][0]
    assert type(group["lr"]) is float and group["lr"] == 1e-5
    model, args = pretrained.load_model(tmp_path / "c.pt")
    assert args.model == "SLIP_NANO8" and not hasattr(args, "ssl_scale")
    assert str(args.output_dir) == "/checkpoint/user/run"
    assert not model.training
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


class Payload:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def namespace_with(value):
    return released_args(gpu=value)


@pytest.mark.parametrize("wrap", [lambda x: {"x": x}, namespace_with, lambda x: [(x,)]])
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir])
def test_a_hostile_checkpoint_is_refused_unexecuted(tmp_path, wrap, function):
    target = tmp_path / "executed"
    argument = {os.system: f"touch {target}", eval: f"open({str(target)!r}, 'w')"}
    payload = Payload(function, argument.get(function, str(target)))
    save_released(tmp_path / "c.pt", extra=wrap(payload))
    with pytest.raises(InputError, match="refused.*(system|eval|mkdir)") as error:
        checkpoint.load(tmp_path / "c.pt")
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_a_packed_checkpoint_is_refused(tmp_path):
    """One that unpacks to far more than its file: torch.save never compresses."""
    torch.save({"state_dict": {"a": torch.zeros(2**22)}, "args": {}}, tmp_path / "c.pt")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as sound,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in sound.namelist():
            bomb.writestr(name, sound.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(InputError, match=r"bomb.pt is refused: it claims to unpack to \d{8} bytes"):
        checkpoint.load(tmp_path / "bomb.pt")


SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "damaged"),
        (LFS, "c.pt is a pointer of git-lfs; fetch the file itself by git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "c.pt is a web page; download the file that the page shows"),
        (SAFETENSORS, "c.pt is a safetensors file; it holds weights alone, so take the file of "),
        (b"no checkpoint at all", "refused|damaged"),
        (pickle.dumps({"a": 1}), "refused|damaged|no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path, content, match):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        checkpoint.load(tmp_path / "c.pt")
    assert "c.pt" in str(error.value) and "\n" not in str(error.value)


def test_names_that_wrappers_gave_are_taken_off(tmp_path):
    """torch.compile's and DDP's, in any order, and of modules compiled one by one."""
    model = save_released(tmp_path / "c.pt", "")
    state = torch.load(tmp_path / "c.pt", weights_only=False)
    sound = state["state_dict"]

    def within(key):
        return key.replace("visual.", "visual._orig_mod.", 1)

    for wrap in ("_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"):
        for change in (str, within):
            weights = {wrap.format(change(key)): value for key, value in sound.items()}
            torch.save(state | {"state_dict": weights}, tmp_path / "c.pt")
            assert checkpoint.load(tmp_path / "c.pt")["state_dict"].keys() == sound.keys()
    assert sound.keys() == model.state_dict().keys()
    assert checkpoint.plain_key("a_orig_mod.module.b") == "a_orig_mod.module.b"
    weights = {**sound, "module.logit_scale": sound["logit_scale"]}
    torch.save(state | {"state_dict": weights}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt: it holds weights twice"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "c.pt").touch()
    monkeypatch.setattr(checkpoint, "check_content", refuse)
    with pytest.raises(InputError, match="c.pt: Permission denied; make it readable"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_truncated_checkpoint_is_damaged(tmp_path):
    path = tmp_path / "c.pt"
    save_released(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_absent_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match=r"absent.pt' is absent; check the path"):
        checkpoint.load(tmp_path / "absent.pt")
    torch.save({"weights": 1}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="no checkpoint of a training run"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "other, match",
    [
        ("CLIP_NANO8", "unknown: image_mlp"),
        ("SIMCLR_NANO8", "unknown: positional_embedding"),
        ("SLIP_VITTINY8", "missing: visual.blocks.2"),
    ],
)
def test_a_checkpoint_of_another_model_names_keys(tmp_path, other, match):
    save_released(tmp_path / "c.pt")
    state = checkpoint.load(tmp_path / "c.pt")["state_dict"]
    with pytest.raises(InputError, match=match):
        checkpoint.load_weights(create_model(other, 32, 16), state, "c.pt", "--model")


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": [1]},
        {"state_dict": {"a": 1}},
        {"args": None},
        {"args": "x"},
        {"args": {1: 2}},
    ],
)
def test_a_checkpoint_of_odd_kinds(tmp_path, change):
    save_released(tmp_path / "c.pt", **change)
    with pytest.raises(InputError, match="of another kind|does not say which model"):
        pretrained.load_model(tmp_path / "c.pt")


def test_an_optimizer_of_another_model_is_told(tmp_path):
    save_released(tmp_path / "c.pt")
    saved = checkpoint.load(tmp_path / "c.pt")["optimizer"]
    for name in ("SLIP_NANO8", "CLIP_VITTINY8"):
        model = create_model(name, 64, 16)
        optimizer = torch.optim.AdamW(optimization.param_groups(model, 0.1))
        with pytest.raises(InputError, match="optimizer is of another model"):
            checkpoint.restore_optimizer(optimizer, saved, "c.pt", "--model")


def test_moments_take_the_layout_of_their_parameter():
    """Fused AdamW walks memory: moments saved contiguous must follow a channels_last weight."""

    def start():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return conv, torch.optim.AdamW(optimization.param_groups(conv, 0.1), 0.1, fused=True)

    def step(conv, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    (conv, optimizer), (other, resumed) = start(), start()
    step(conv, optimizer, 1)
    other.load_state_dict(conv.state_dict())
    saved = optimizer.state_dict()
    saved["state"] = {
        i: {k: v.clone(memory_format=torch.contiguous_format) for k, v in moments.items()}
        for i, moments in saved["state"].items()
    }
    checkpoint.restore_optimizer(resumed, saved, "c.pt", "--model")
    step(conv, optimizer, 2)
    step(other, resumed, 2)
    assert torch.equal(other.weight, conv.weight)


def test_our_checkpoints_are_plain_data(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"state_dict": {}, "args": {"model": "x"}})
    assert torch.load(tmp_path / "c.pt", weights_only=True)["args"] == {"model": "x"}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_all_that_a_sound_checkpoint_may_hold(tmp_path):
    """Beside what released ones do: what torch.save makes of sets, bytes, dtypes and parameters."""
    weights = {
        "a": torch.nn.Parameter(torch.ones(2)),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "c": torch.tensor([1, 2], dtype=torch.uint32),
        "d": torch.zeros(0),
        "e": torch.tensor(True),
    }
    extra = [{"x"}, collections.Counter("aab"), b"bytes", torch.Size([1]), torch.float16]
    extra += [np.int64(5), np.bool_(True), np.float32(0.5), torch.device("cpu"), 1.5, None]
    for is_zip in (True, False):
        if not is_zip:
            del weights["c"]  # which PyTorch itself cannot read in the old format
        state = {"state_dict": weights, "args": {}, "extra": extra}
        torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=is_zip)
        loaded = checkpoint.load(tmp_path / "c.pt")
        assert loaded["extra"] == extra
        assert all(torch.equal(loaded["state_dict"][k], v) for k, v in weights.items())


def test_weights_of_half_precision_fit_a_model_of_single(tmp_path):
    expected = save_released(tmp_path / "c.pt").half()
    state = checkpoint.load(tmp_path / "c.pt")
    state |= {"state_dict": expected.state_dict(), "optimizer": {}, "args": vars(state["args"])}
    torch.save(state, tmp_path / "half.pt")
    model, _ = pretrained.load_model(tmp_path / "half.pt")
    assert model.logit_scale.dtype == torch.float32


def test_memory_may_grow_again_after_loading(tmp_path):
    save_released(tmp_path / "c.pt")
    limits, threads = resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads()
    pretrained.load_model(tmp_path / "c.pt")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert torch.get_num_threads() == threads
