"""Strings of weights: each kind opens as the model it was made from; faults are one line."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import assert_equal
from huggingface_hub import constants
from safetensors.torch import save_file
from test_layouts import random_weights

import image_towers
import layouts
import models
import towers
import weight_names
from preprocessing import CLIP_PREPROCESSING, SLIP_PREPROCESSING
from pretrained import list_pretrained, load_model, open_weights
from utils import InputError

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
ROW = towers.Tower("vit_base_patch32_clip_224", SIZES, 32, 64, 1, 2, False, CLIP_PREPROCESSING)
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    """A row of CLIP_TOWERS that is small, named SMALL, and weights SMALL:own and SMALL:gelu."""
    quick = towers.with_quick_gelu(ROW)
    for table in (towers.TOWERS, towers.CLIP_TOWERS):
        monkeypatch.setitem(table, "SMALL", ROW)
    monkeypatch.setitem(towers.TOWERS, "SMALL-quickgelu", quick)
    row = {"repository": "org/small", "url": "https://x.org/releases/small-1a2b.pt"} | HALF
    known = {"SMALL:own": row | {"quick_gelu": True}, "SMALL:gelu": row | {"quick_gelu": False}}
    known["SMALL:gelu"] |= {"url": None, "repository": "org/other"}
    known |= weight_names.known_weights()
    monkeypatch.setattr(weight_names, "known_weights", lambda: known)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts files into the cache of the hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, name, write, revision="main"):
        commit = f"{len(revision):040x}"
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        for path, text in ((folder / "refs" / revision, commit), (folder / "x", "")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        write(folder / "snapshots" / commit / name)

    return put


def small(name="CLIP_SMALL", seed=0):
    torch.manual_seed(seed)
    model = models.create_model(name, 16, 8).eval()
    model.load_state_dict(random_weights(model.state_dict()))
    return model


def theirs(model):
    """open_clip's state dict."""
    return layouts.to_open_clip(model.state_dict(), is_native=True)


def embeddings(model):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 3, 32, 32, generator=generator), model.tokenizer(["a", "b c"])
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(texts)


def assert_same_model(found, expected):
    assert type(found) is type(expected) and found.preprocessing == expected.preprocessing
    for a, b in zip(embeddings(found), embeddings(expected), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", ["pt", "wrapped", "safetensors", "huggingface", "ours"])
def test_a_bare_file_is_known_by_its_keys(tmp_path, kind, capsys):
    model, path = small(), tmp_path / f"x.{kind}"
    state = theirs(model)
    if kind == "wrapped":
        state = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
    if kind == "huggingface":
        state = layouts.to_huggingface(model.state_dict())
    if kind == "ours":
        state = model.state_dict()
    save_file({k: v.clone() for k, v in state.items()}, path) if kind == "safetensors" else (
        torch.save(state, path)
    )
    found, args = load_model(path)
    assert args.model == "CLIP_SMALL" and not found.training
    assert_same_model(found, model)
    said = capsys.readouterr().err
    assert "does not tell its activation, GELU is assumed; if it was" in said
    assert f"give SMALL-quickgelu:{path}" in said and said.count("\n") == 1

    quick, args = load_model(f"SMALL-quickgelu:{path}")
    assert args.model == "CLIP_SMALL-quickgelu" and not capsys.readouterr().err
    expected = models.create_model("CLIP_SMALL-quickgelu").eval()
    expected.load_state_dict(model.state_dict())
    assert_same_model(quick, expected)
    assert not torch.equal(embeddings(quick)[0], embeddings(found)[0])
    assert not torch.equal(embeddings(quick)[1], embeddings(found)[1])


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """{is of OpenAI's: (archive of a traced model of open_clip's, half in half, its weights)}"""
    import open_clip

    image = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"width": 64, "heads": 1, "layers": 2}
    torch.manual_seed(0)
    peer = open_clip.CLIP(32, image, text, quick_gelu=True).eval()
    weights, files = {k: v.clone() for k, v in peer.state_dict().items()}, {}
    for is_openai in (False, True):
        for name in ("input_resolution", "context_length", "vocab_size") if is_openai else ():
            vars(peer).pop(name, None)
            peer.register_buffer(name, torch.tensor(32))
        with pytest.warns(FutureWarning):  # TorchScript is deprecated
            inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)
            script = torch.jit.trace(peer, inputs, check_trace=False)
            path = tmp_path_factory.mktemp("archives") / f"{is_openai}.pt"
            torch.jit.save(script, path)
        files[is_openai] = path, layouts.from_open_clip(weights)
    return files


def test_openais_archives_have_quick_gelu(archives, capsys):
    path, expected = archives[True]
    for source in (path, f"SMALL:{path}", f"CLIP_SMALL:{path}"):
        found, args = load_model(source)
        assert args.model == "CLIP_SMALL-quickgelu"
        assert_equal(found.state_dict(), expected)
    with pytest.raises(InputError, match="it holds SMALL-quickgelu, not SMALL; choose the former"):
        open_weights(path, "SMALL")
    assert not capsys.readouterr().err


def test_the_name_tells_of_somebodys_own_archive(archives, capsys):
    path, expected = archives[False]
    found, args = load_model(path)
    assert args.model == "CLIP_SMALL-quickgelu"
    assert_equal(found.state_dict(), expected)
    assert f"trained with GELU, give SMALL:{path}" in capsys.readouterr().err
    assert load_model(f"SMALL:{path}")[1].model == "CLIP_SMALL"


def test_a_name_that_does_not_fit_is_said_by_keys(tmp_path):
    state = theirs(small())
    path = save(tmp_path / "x.pt", state)
    with pytest.raises(
        InputError, match=r"x.pt: they do not fit CLIP_ViT-H-14 \(.* visual.bl"
    ) as e:
        load_model(f"ViT-H-14:{path}")  # whose memory the file's size would not allow
    assert "\n" not in str(e.value)
    del state["positional_embedding"]
    path = save(tmp_path / "y.pt", state)
    with pytest.raises(InputError, match=r"SMALL \(1 keys missing: positional_embedding\)"):
        load_model(f"SMALL:{path}")


def test_a_released_file_is_known_by_its_name(tmp_path, capsys):
    path = save(tmp_path / "small-1a2b.pt", theirs(small("CLIP_SMALL-quickgelu")))
    for source in (path, f"SMALL:{path}", f"SMALL-quickgelu:{path}"):
        found, args = load_model(source)
        assert args.model == "CLIP_SMALL-quickgelu" and found.preprocessing.mean == (0.5, 0.5, 0.5)
    assert not capsys.readouterr().err


def test_checkpoints_that_say_nothing_have_slips_form(tmp_path):
    model = small("SIMCLR_SMALL")
    state = {"state_dict": model.state_dict(), "args": {"model": "SIMCLR_SMALL"}}
    state["args"] |= {"ssl_mlp_dim": 16, "ssl_emb_dim": 8}
    found, _ = load_model(save(tmp_path / "x.pt", state))
    assert found.preprocessing == replace(SLIP_PREPROCESSING, image_size=32)


@pytest.mark.parametrize(
    "key",
    [
        *("positional_embedding", "visual.pos_embed", "visual.patch_embed.proj.weight"),
        *("text_projection", "image_projection", "image_mlp.layer1.weight"),
    ],
)
def test_a_number_in_the_place_of_a_tensor_is_one_line(tmp_path, key, monkeypatch):
    monkeypatch.setattr(layouts, "CLIP_TOWERS", {"SMALL": ROW})  # the others take long to compare
    state = small("SLIP_SMALL").state_dict() | {key: torch.tensor(3.0)}
    for source in (f"SLIP_SMALL:{save(tmp_path / 'x.pt', state)}", tmp_path / "x.pt"):
        with pytest.raises(InputError, match="x.pt") as error:
            load_model(source)
        assert "\n" not in str(error.value)


def test_a_slip_by_its_name(tmp_path):
    model = small("SLIP_SMALL")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    found, _ = load_model(f"SLIP_SMALL:{tmp_path}/x.pt")
    assert_same_model(found, model)
    with pytest.raises(InputError, match=r"of another model \(.* missing: image_mlp"):
        load_model(f"SLIP_SMALL:{save(tmp_path / 'y.pt', theirs(model))}")


def save(path, value):
    torch.save(value, path)
    return path


def test_another_image_size_and_context(tmp_path):
    state = theirs(small())
    path = save(tmp_path / "x.pt", state)
    larger, _ = load_model(path, 64)
    assert larger.image_size == 64 and larger.visual.pos_embed.shape[1] == 65
    own = {"visual.pos_embed": small().visual.pos_embed.data}
    resampled = image_towers.resample_positions(own, larger.visual)["visual.pos_embed"]
    assert torch.equal(larger.visual.pos_embed, resampled)
    with pytest.raises(InputError, match="image size 60 is no multiple of the patch of 8 pixels"):
        load_model(path, 60)
    state["positional_embedding"] = state["positional_embedding"][:20]
    state["visual.positional_embedding"] = torch.randn(37, 64)
    found, _ = load_model(save(path, state))
    assert found.preprocessing.context_length == 20 and found.tokenizer("a").shape == (20,)
    assert found.image_size == 48


# ---------------------------------------------------------------------------------------------
# Folders, tags and the hub

CONFIG = {
    "model_cfg": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {}, "text_cfg": {}},
    "preprocess_cfg": {**HALF, "interpolation": "bilinear", "resize_mode": "shortest"},
}


def write_folder(folder, model, config=CONFIG, name="open_clip_pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(theirs(model), folder / name)
    return folder


def test_a_folder_says_how_its_model_was_trained(tmp_path, capsys):
    model = small("CLIP_SMALL-quickgelu")
    found, args = load_model(write_folder(tmp_path / "x", model))
    form = replace(model.preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    assert args.model == "CLIP_SMALL-quickgelu" and found.preprocessing == form
    for a, b in zip(embeddings(found), embeddings(model), strict=True):
        assert torch.equal(a, b)
    assert not capsys.readouterr().err


def test_a_tag_carries_activation_and_mean(hub, capsys):
    model = small("CLIP_SMALL-quickgelu")
    hub("org/small", "open_clip_model.safetensors", lambda path: save_file(theirs(model), path))
    hub("org/other", "open_clip_pytorch_model.bin", lambda path: torch.save(theirs(model), path))
    for source in ("SMALL:own", "SMALL-quickgelu:own"):
        found, args = load_model(source)
        assert args.model == "CLIP_SMALL-quickgelu" and found.preprocessing.mean == (0.5, 0.5, 0.5)
        assert torch.equal(embeddings(found)[0], embeddings(model)[0])
    assert load_model("SMALL:gelu")[1].model == "CLIP_SMALL"
    assert not capsys.readouterr().err


def test_a_repository_of_the_hub(hub, tmp_path):
    model = small("CLIP_SMALL-quickgelu")
    write_folder(tmp_path / "x", model)
    for file in (tmp_path / "x").iterdir():
        hub("org/name", file.name, lambda path, file=file: path.write_bytes(file.read_bytes()))
        hub("org/old", file.name, lambda path, file=file: path.write_bytes(file.read_bytes()), "v1")
    for source in ("hf-hub:org/name", "hf-hub:org/old@v1"):
        found, args = load_model(source)
        assert args.model == "CLIP_SMALL-quickgelu"
        assert torch.equal(embeddings(found)[0], embeddings(model)[0])


STRINGS = {
    "SMALL:own": r"open_clip_model.safetensors of https://huggingface.co/org/small is wanted: the "
    r"cache does not hold it, .*; download that file, or https://x.org/releases/small-1a2b.pt, "
    r"elsewhere and give SMALL-quickgelu:FILE",
    "SMALL:gelu": "org/other is wanted: .*; download that file elsewhere and give SMALL:FILE",
    "hf-hub:org/name": "open_clip_config.json of .*/org/name is wanted: .*and give its folder",
    "hf-hub:no name": "'no name'",
    "SMALL:zzz": "'zzz' is no tag of SMALL and no file; choose from own, gelu, or give a file",
    "SMALL-quickgelu:gelu": "'gelu' is no tag of SMALL-quickgelu and no file; choose from own, or",
    "VITB16:zzz": "'zzz' is no tag of VITB16 and no file; give a file",
    "ViT-Z:openai": "unknown model 'CLIP_ViT-Z'; choose .*ViT-B-32",
    "roberta-ViT-B-32:laion2b_s12b_b32k": "-roberta-base-laion2B-s12B-b32k is wanted: .*; download "
    "that file elsewhere and give roberta-ViT-B-32:FILE",
    "ViT-B-33": "'ViT-B-33' is no file and no tower; check the path, or choose from .*ViT-B-32",
    "SMALL": "names no weights; give SMALL:TAG, TAG of own, gelu, or a file",
    "none.pt": "weights 'none.pt' is absent; check the path",
}


@pytest.mark.parametrize("source", STRINGS)
def test_a_string_that_names_nothing_is_one_line(source, hub):
    with pytest.raises(InputError, match=STRINGS[source]) as error:
        load_model(source)
    assert "\n" not in str(error.value)


def test_the_hubs_package_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs the package huggingface_hub: pip install"):
        load_model("SMALL:own")


@pytest.mark.parametrize("error", ["Repository", "RemoteEntry"])
def test_what_the_hub_answers_is_told(error, hub, monkeypatch):
    kind = getattr(huggingface_hub.errors, f"{error}NotFoundError")

    def fail(*args, **options):
        raise kind("Not here.\n\nMore lines.", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    match = {
        "Repository": "is wanted: Not here",
        "RemoteEntry": "has none of open_clip_model.safetens",
    }
    with pytest.raises(InputError, match=match[error]) as caught:
        load_model("SMALL:own")
    assert "\n" not in str(caught.value)


def test_pretrained_json_is_whole():
    known = json.loads(weight_names.PRETRAINED.read_text())["weights"]
    listed = [name for name in list_pretrained() if not name.startswith("SMALL")]
    assert len(known) == 28 and listed == list(known)
    assert known["ViT-L-14:laion2b_s32b_b82k"]["mean"] == [0.5, 0.5, 0.5]
    quick = {name for name, row in known.items() if row["quick_gelu"] and name in listed}
    assert quick == {name for name in listed if name.endswith(":openai")} | {
        *("RN50:yfcc15m", "RN50:cc12m", "RN101:yfcc15m"),
        *("ViT-B-32:laion400m_e31", "ViT-B-32:laion400m_e32"),
        "roberta-ViT-B-32:laion2b_s12b_b32k",
    }
    for row in known.values():
        assert row["repository"].count("/") == 1 and len(row["mean"]) == len(row["std"]) == 3
