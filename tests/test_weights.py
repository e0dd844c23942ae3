"""Files of weights: each kind opens as the weights it was made from, and odd ones are refused."""

import argparse
import collections
import contextlib
import copy
import io
import json
import pickle
import struct
import sys
import types
import zipfile

import pytest
import torch
from helpers import LFS, assert_equal
from pickles import archive, built, data, dict_of, named, pickled, tuple_of
from read_payloads import peak_memory
from safetensors.torch import save_file

from infra import checkpoint, tensor_pickles, weights
from utils import InputError

MAKE = "open('canary', 'w')"


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj_weight = torch.nn.Parameter(torch.randn(8, 8))
        self.out_proj = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(x @ self.in_proj_weight)


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_resolution = 8
        self.conv1 = torch.nn.Conv2d(3, 8, 4, 4, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.resblocks = torch.nn.Sequential(Attention(), Attention())
        self.proj = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return self.resblocks(self.bn1(self.conv1(x)).flatten(2).transpose(1, 2)) @ self.proj


class Clip(torch.nn.Module):
    """A model with OpenAI's names, and with attributes that are no weights."""

    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = torch.nn.Embedding(5, 8)
        self.logit_scale = torch.nn.Parameter(torch.ones([]))
        self.context_length, self.sizes, self.names, self.nothing = 77, [1, 2], ["a"], None
        self.register_buffer("input_resolution", torch.tensor(8))
        self.register_buffer("vocab_size", torch.tensor(5))
        self.register_buffer("attn_mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, image):
        return self.visual(image) * self.logit_scale.exp()


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    model = Clip().eval()
    model.visual.bn1.running_mean.normal_()
    return model


def halve(model):
    """OpenAI's mixture: convolutions, attention and projections in half precision."""
    for key, param in model.named_parameters():
        if key.endswith(("conv1.weight", "in_proj_weight", "out_proj.weight", "visual.proj")):
            param.data = param.data.half()
    assert torch.half in {value.dtype for value in model.state_dict().values()}


def expected(state_dict):
    """A state dict as weights.read gives it, in single precision."""
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in state_dict.items()
    }


def assert_weights(content, state_dict):
    assert content.tensors.keys() == expected(state_dict).keys()
    assert_equal({key: content.tensors[key] for key in expected(state_dict)}, expected(state_dict))
    assert {t.dtype for t in content.tensors.values()} == {torch.float32, torch.int64}


@pytest.fixture(scope="module")
def scripts(clip, tmp_path_factory):
    """{kind: (file of torch.jit.save, state dict of what was saved)}"""
    folder, files = tmp_path_factory.mktemp("scripts"), {}
    makers = {"scripted": torch.jit.script}
    makers["traced"] = lambda model: torch.jit.trace(model, torch.zeros(1, 3, 8, 8))
    for kind, make in makers.items():
        with pytest.warns(FutureWarning):  # TorchScript is deprecated
            script = make(copy.deepcopy(clip))
            halve(script)
            torch.jit.save(script, folder / f"{kind}.pt")
        files[kind] = folder / f"{kind}.pt", script.state_dict()
    return files


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_a_torchscript_archive_opens_as_its_state_dict(scripts, kind):
    path, state_dict = scripts[kind]
    content = weights.read(path)
    assert content.is_torchscript and content.state == {}
    assert_weights(content, state_dict)
    assert {"visual.resblocks.1.in_proj_weight", "attn_mask"} <= content.tensors.keys()
    assert {"input_resolution", "vocab_size"} <= state_dict.keys()


def test_plain_tensors_of_scripted_modules_are_among_the_weights(tmp_path):
    block = Attention()
    block.mask = torch.ones(2)
    save_script(block, tmp_path / "x.pt")
    assert weights.read(tmp_path / "x.pt").tensors.keys() == {*block.state_dict(), "mask"}


def test_code_in_an_archive_is_never_looked_at(scripts, tmp_path, monkeypatch):
    """Hostile text in the place of the code, whose checksums would fail if it were read."""
    path, state_dict = scripts["scripted"]
    with zipfile.ZipFile(path) as sound, zipfile.ZipFile(tmp_path / "x.pt", "w") as hostile:
        for name in sound.namelist():
            is_code = "/code/" in name
            hostile.writestr(name, MAKE * 9 if is_code else sound.read(name))
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content.replace(MAKE.encode(), MAKE.upper().encode(), 3))
    assert "/code/" in zipfile.ZipFile(tmp_path / "x.pt").testzip()
    monkeypatch.chdir(tmp_path)
    assert_weights(weights.read("x.pt"), state_dict)
    assert not (tmp_path / "canary").exists()


def save_script(model, path):
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(model), path)


def save_old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


WRAPS = {
    "bare": lambda sd: sd,
    "open_clip": lambda sd: {"epoch": 3, "name": "x", "state_dict": sd, "optimizer": {"state": {}}},
    "MoCo": lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}, "arch": "vit"},
    "MAE": lambda sd: {"model": sd, "args": argparse.Namespace(a=1), "optimizer": {0: sd}},
    "DINO": lambda sd: {"student": {"x": torch.ones(1)}, "teacher": sd, "epoch": 1},
    "twice": lambda sd: {"model": {"state_dict": sd}, "epoch": torch.tensor(3)},
    "compiled": lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()},
}


@pytest.mark.parametrize("save", [torch.save, save_old])
@pytest.mark.parametrize("wrap", WRAPS)
def test_state_dicts_open_whatever_is_around_them(tmp_path, clip, wrap, save):
    state_dict = clip.state_dict() | {"token_embedding.weight": clip.token_embedding.weight.half()}
    save(WRAPS[wrap](state_dict), tmp_path / "x.bin")
    content = weights.read(tmp_path / "x.bin")
    assert content.state == {} and not content.is_torchscript
    assert_weights(content, state_dict)


def test_safetensors_open(tmp_path, clip):
    state_dict = {f"module.{k}": v.clone() for k, v in clip.state_dict().items()}
    state_dict["module.visual.proj"] = state_dict["module.visual.proj"].bfloat16()
    save_file(state_dict, tmp_path / "no suffix", {"format": "pt"})
    content = weights.read(tmp_path / "no suffix")
    assert_weights(content, {k.removeprefix("module."): v for k, v in state_dict.items()})


def test_a_checkpoint_of_a_training_run_keeps_its_other_entries(tmp_path, clip):
    state = {"state_dict": clip.state_dict(), "epoch": 4, "preprocessing": {"mean": [0.5]}}
    torch.save(state | {"args": {"model": "CLIP_NANO8"}}, tmp_path / "x.pt")
    content = weights.read(tmp_path / "x.pt")
    assert_weights(content, clip.state_dict())
    assert content.state.pop("args").model == "CLIP_NANO8"
    assert content.state == {"epoch": 4, "preprocessing": {"mean": [0.5]}}
    torch.save(state | {"args": {}, "x": Stranger()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt is refused: it names 'test_weights.Stranger'"):
        weights.read(tmp_path / "x.pt")


class Stranger:
    pass


def test_objects_of_other_trainers_are_left_out(tmp_path, monkeypatch):
    """Lightning's keep classes as keys, and dicts of its own; none of them is imported to read."""
    module = types.ModuleType("pytorch_lightning.utilities")
    made = []
    for name in ("AttributeDict", "Checkpoint"):
        kind = type(name, (dict,), {"__module__": module.__name__})
        kind.__setitem__ = lambda self, key, value: made.append(key)
        setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"state_dict": collections.OrderedDict({"model.a": torch.ones(2)})}
    state["callbacks"] = {module.Checkpoint: {"best": collections.defaultdict(list, a=[1])}}
    state["hyper_parameters"] = module.AttributeDict(lr=0.1, sizes={1, 2})
    torch.save(state, tmp_path / "x.ckpt")
    assert weights.read(tmp_path / "x.ckpt").tensors["model.a"].tolist() == [1, 1]
    assert not made


def test_tensors_of_every_plain_kind_and_layout(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "part": base[1:3, ::2], "again": base, "empty": base[:0]}
    tensors |= {"one": torch.tensor(True), "parameter": torch.nn.Parameter(base[0].clone())}
    tensors["last"] = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last).weight
    tensors |= {"double": base.double(), "complex": base.to(torch.complex128)}
    for save in (save_old, torch.save):
        if save is torch.save:  # without a place in the old format
            tensors |= {"wide": torch.tensor([2**40], dtype=torch.uint64)}
        save(tensors, tmp_path / "x.pt")
        found = weights.read(tmp_path / "x.pt").tensors
        assert_equal(found, tensors)
        assert [t.dtype for t in found.values()] == [t.dtype for t in tensors.values()]
        assert all(t.data_ptr() % t.itemsize == 0 for t in found.values())
        assert found["again"].data_ptr() == found["transposed"].data_ptr()  # still shared
        found["again"][0] = 7  # the file stays as it is
        assert weights.read(tmp_path / "x.pt").tensors["again"][0, 1] == 1


@pytest.mark.parametrize("kind", ["zip", "old", "script", "safetensors", "half"])
def test_a_file_is_not_copied(tmp_path, kind):
    """Old files, unaligned, are copied once, and half precision becomes single."""
    model = torch.nn.Embedding(2**12, 2**10, dtype=torch.half if kind == "half" else None)
    save = {"old": save_old, "safetensors": save_file, "script": save_script}.get(kind, torch.save)
    save(model if kind == "script" else model.state_dict(), tmp_path / "x")
    before = peak_memory(reset=True)
    found = weights.read(tmp_path / "x").tensors
    used = peak_memory() - before
    assert 2**23 <= (tmp_path / "x").stat().st_size < 2**24 + 2**14
    assert_equal(found, expected(model.state_dict()))
    assert used < {"old": 2.3, "half": 1.8}.get(kind, 0.4) * 2**24


# ---------------------------------------------------------------------------------------------
# Refusals


def stand_ins():
    """All that a pickle can get hold of by a name, with its attributes."""
    named = {**tensor_pickles.STAND_INS, "a module": tensor_pickles.Module}
    named["left out"] = checkpoint.Nothing
    return {name: (stand_in, dict(vars(stand_in))) for name, stand_in in named.items()}


@pytest.mark.parametrize("start", [b"", b")R", b")\x81"])  # by name, of a call, an instance
def test_no_state_reaches_a_stand_in(start):
    """A pickle may hand any object a state, which by default would become its attributes."""
    before = stand_ins()
    state = tuple_of(data(None), dict_of(__init__=data(1), dtype=data(1), attributes=data(1)))
    for name in (*tensor_pickles.STAND_INS, "__torch__.A", "omegaconf.Any", "argparse.Namespace"):
        module, _, last = name.rpartition(".")
        body = pickled(built(named(f"{module}:{last}") + start, state))
        with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):
            made = tensor_pickles.Unpickler(io.BytesIO(body), 9, None).load()
            is_instance = hasattr(made, "__dict__") and not isinstance(made, type)
            assert not is_instance or "__init__" not in vars(made)
    assert stand_ins() == before


def safetensors_of(header, content=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {  # name: (the refusal, the file)
    "no tensors": ("x holds no weights", safetensors_of({}, b"")),
    "text alone": ("x holds no weights", safetensors_of({"__metadata__": {"a": "b"}}, b"")),
    "truncated": ("damaged: .*not fully covered", safetensors_of({"a": entry()}, bytes(7))),
    "cut in the header": (
        "header claims 61 bytes, the file has 40",
        safetensors_of({"a": entry()})[:40],
    ),
    "a header of 1 TB": ("claims 1099511627775 bytes", safetensors_of({}, length=2**40 - 1)),
    "a long header": ("more than 4194304", safetensors_of(b"{" + b" " * 2**22 + b"}", b"")),
    "no JSON": ("damaged: .*header", safetensors_of(b"{'a': 1}")),
    "a shape beyond": ("damaged: ", safetensors_of({"a": entry((2**38,))})),
    "a shape beyond numbers": ("damaged: ", safetensors_of({"a": entry((2**62, 2**62))})),
    "beyond the end": ("damaged: ", safetensors_of({"a": entry((2**38,), (0, 2**40))})),
    "before the start": ("damaged: ", safetensors_of({"a": entry(offsets=(-8, 0))})),
    "the same numbers twice": ("damaged: ", safetensors_of({"a": entry(), "b": entry()})),
    "a kind of no name": ("damaged: ", safetensors_of({"a": entry(dtype="F31")})),
    "a kind of a long name": ("damaged: ", safetensors_of({"a": entry(dtype="F" * 10**6)})),
    "eight bits": ("'a' is of torch.float8", safetensors_of({"a": entry((8,), dtype="F8_E4M3")})),
    "twice": (
        "holds weights twice",
        safetensors_of({"a": entry((1,), (0, 4)), "module.a": entry((1,), (4, 8))}),
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, name):
    match, content = SAFETENSORS[name]
    assert_refused(tmp_path, content, match)


def assert_refused(folder, content, match):
    (folder / "x").write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        weights.read(folder / "x")
    text = str(error.value)
    assert str(folder / "x") in text and "\n" not in text and len(text) < 300 + len(str(folder))


def saved(value, save=torch.save):
    buffer = io.BytesIO()
    save(value, buffer)
    return buffer.getvalue()


def repacked(content, method=zipfile.ZIP_STORED, **changes):
    """A file of torch.save with members changed, dropped (None), or compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as sound:
        members = {name.partition("/")[2]: sound.read(name) for name in sound.namelist()}
    members |= {name.replace("_", "/"): value for name, value in changes.items()}
    kept = [(f"c/{name}", value) for name, value in members.items() if value is not None]
    return archive(kept, method)


ONE = {"a": torch.zeros(3)}
OTHERS = {
    "a pointer": ("x is a pointer of git-lfs", LFS),
    "a page": ("x is a web page", b"<!doctype html>"),
    "nothing": ("x is damaged", b""),
    "text": ("x is (damaged|refused)", b"weights"),
    "a pickle of numbers": ("neither PyTorch's nor safetensors'", pickle.dumps({"a": [1.0]})),
    "a zip of images": ("a zip with 0 members data.pkl", archive([("a/1.jpg", b"x")])),
    "no tensors": ("holds no weights", saved({"a": 1, "state_dict": {"epoch": 1}})),
    "a list": ("holds no weights", saved([torch.zeros(3)])),
    "numbered": ("holds no weights", saved({0: torch.zeros(3)})),
    "an empty run": ("holds no weights", saved({"state_dict": {}, "args": {}})),
    "a whole module": ("names 'torch.nn.modules.linear.Linear'", saved(torch.nn.Linear(1, 1))),
    "sparse": ("sparse tensors are not read", saved({"a": torch.eye(2).to_sparse()})),
    "eight bits": ("quantised.*not read", saved({"a": torch.zeros(2).to(torch.float8_e5m2)})),
    "twice": ("holds weights twice", saved({"a": torch.ones(1), "module.a": torch.ones(1)})),
    "packed": ("is packed", repacked(saved(ONE), zipfile.ZIP_DEFLATED)),
    "short": ("storage '0' claims 3 numbers", repacked(saved(ONE), data_0=bytes(8))),
    "long": ("storage '0' claims 3 numbers", repacked(saved(ONE), data_0=bytes(16))),
    "no numbers": ("no item named 'c/data/0'", repacked(saved(ONE), data_0=None)),
    "of another machine": ("big-endian", repacked(saved(ONE), byteorder=b"big")),
    "cut": ("damaged", saved(ONE)[:-30]),
    "old and cut": ("damaged: storage .* ends behind the end", saved(ONE, save_old)[:-1]),
    "an old one of another length": (
        "claims 7 numbers",
        saved(ONE, save_old)[:-20] + struct.pack("<q", 7) + bytes(12),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_holds_no_plain_weights_is_refused(tmp_path, name):
    match, content = OTHERS[name]
    assert_refused(tmp_path, content, match)


@pytest.mark.filterwarnings("ignore")  # quantisation is deprecated
def test_quantised_tensors_are_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert_refused(tmp_path, saved({"a": quantised}), "quantised and sparse tensors are not read")


def test_absent_files_and_folders(tmp_path):
    with pytest.raises(InputError, match="weights '.*absent.pt' is absent; check the path"):
        weights.read(tmp_path / "absent.pt")
    with pytest.raises(InputError, match="is no regular file"):
        weights.read(tmp_path)


def test_many_views_of_half_precision_are_bounded(tmp_path):
    """A file of 2 MB whose tensors would take 4 GB in single precision."""
    value = torch.zeros(2**20, dtype=torch.half)
    content = saved({str(i): value for i in range(1000)})
    assert_refused(tmp_path, content, "claim more memory than its size allows")
    assert_refused(tmp_path, saved({"a": value[:1].expand(2**30)}), "claims 1073741824 numbers")
