"""Text towers of Hugging Face, beside open_clip's; from training to export."""

import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, exact_training, train, views_of, weights, write_folders
from safetensors.torch import load_file
from test_export import call
from test_formats import ROWS, open_by_open_clip
from test_layouts import assert_same
from test_pretrained import hub  # noqa: F401
from text_folders import change_json, write_text_model

import engine
import eval_retrieval
import eval_zeroshot
import formats
import hf_text
import layers
import main
import main_linear
import models
import text_models
import towers
import warmup
from onnx_files import write_onnx
from pretrained import load_model, open_weights
from utils import InputError

TEXTS = ["a picture of a Dog", "Ünïcode &amp;amp; more", "", "photo " * 90]


def create(folder, name="CLIP_NANO8"):
    """(model with that text tower and its weights, its text model)."""
    text_model = text_models.open_text_model(str(folder))
    model = models.create_model(name, 16, 8, text_model=text_model)
    assert model.text.load_pretrained() == [
        f"text tower {folder.name}: pretrained weights, {folder}/model.safetensors"
    ]
    return model.eval(), text_model


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_embeddings_and_tokens_equal_open_clips(texts, kind):
    from open_clip.hf_model import HFTextEncoder
    from open_clip.tokenizer import HFTokenizer

    model, _ = create(texts[kind])
    peer = HFTextEncoder(str(texts[kind]), 32, None, "mean_pooler", "mlp").eval()
    with torch.no_grad():
        peer.proj[0].weight.copy_(model.text.proj[0].weight)
        peer.proj[2].weight.copy_(model.text.proj[2].weight)
    assert [k for k in model.state_dict() if k.startswith("text.")] == [
        f"text.{key}" for key in peer.state_dict()
    ]
    tokens = model.tokenizer(TEXTS)
    assert torch.equal(tokens, HFTokenizer(str(texts[kind]))(TEXTS))
    lengths = model.tokenizer.lengths(tokens)
    assert lengths[-1] == 77 and lengths[2] == 2 and lengths[0] < 77
    with torch.no_grad():
        theirs = peer(tokens)
        assert theirs.abs().mean() > 0.01
        assert torch.allclose(model.encode_text(tokens), theirs, rtol=0, atol=1e-5)
        short = model.tokenizer.trim(tokens[:3])
        assert short.shape[1] < 77
        assert torch.allclose(model.encode_text(short), theirs[:3], rtol=0, atol=1e-5)
        assert torch.isfinite(model.encode_text(torch.full((2, 9), model.text.padding))).all()
    dummy = warmup.dummy_batch(model, 3, "cpu")["text"]  # padded, as most batches are
    assert dummy.shape == (3, 77) and model.tokenizer.lengths(dummy).tolist() == [1, 1, 1]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_locked_names_are_open_clips(texts, number):
    from open_clip.hf_model import HFTextEncoder

    peer = HFTextEncoder(str(texts["roberta"]), 32, None, "mean_pooler", "mlp")
    peer.lock(unlocked_layers=number)
    model, _ = create(texts["roberta"])
    layers.lock_tower(model, "text", number)
    assert {k for k, p in model.named_parameters() if not p.requires_grad} == {
        f"text.{k}" for k, p in peer.named_parameters() if not p.requires_grad
    }


# ---------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def trained(texts, tiny, tmp_path_factory):
    """A folder of two runs of two epochs, of which one has lost the text model's folder between."""
    root = tmp_path_factory.mktemp("trained")
    folder = shutil.copytree(texts["roberta"], root / "little-roberta")
    flags = ["--text-model", folder, "--update-freq", 2]
    train(tiny, root / "whole", *flags, epochs=2)
    train(tiny, root / "parts", *flags, epochs=1)
    shutil.rmtree(folder)
    train(tiny, root / "parts", *flags, epochs=2)
    return root


def test_a_run_resumes_to_the_bit_without_the_folder(trained, tiny):
    got, expected = weights(trained / "parts"), weights(trained / "whole")
    for key in ("state_dict", "optimizer", "random", "text_model"):
        assert_equal(got[key], expected[key])
    assert expected["args"]["text_model"] == str(trained / "little-roberta")
    with pytest.raises(InputError, match="trained with --text-model .*, not ''; give the same"):
        train(tiny, trained / "parts", val="none")


def test_it_trains_and_its_tokens_are_cut(texts, tiny, tmp_path, capsys):
    seen, forward = [], hf_text.HFText.forward_text

    def spy(tower, text):
        seen.append(text.shape[1])
        return forward(tower, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_text.HFText, "forward_text", spy)
        flags = ["--text-model", texts["bert"], "--grad-checkpointing", "--lr", 1e-2]
        folder = train(tiny, tmp_path / "x", *flags, model="CLIP_NANO8", val="none")
    assert set(seen) == {16}  # of 77
    said = capsys.readouterr().out
    assert f"text tower bert: pretrained weights, {texts['bert']}/model.safetensors" in said
    old = load_file(texts["bert"] / "model.safetensors")
    new = weights(folder)["state_dict"]
    for key in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
        assert not torch.equal(new[f"text.transformer.{key}"], old[key])
    groups = weights(folder)["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(new)


def test_gradients_of_micro_batches_equal_those_of_the_large_batch(texts):
    gradients = {}
    for k in (1, 4):
        t = exact_training("SLIP_NANO8", k, flags=["--text-model", str(texts["roberta"])])
        batches = views_of(t.model, 8, k)
        engine.update(t, batches, 0)
        gradients[k] = {key: param.grad for key, param in t.model.named_parameters()}
    assert "text.transformer.embeddings.word_embeddings.weight" in gradients[1]
    for key, gradient in gradients[1].items():
        assert torch.allclose(gradients[4][key], gradient, rtol=1e-9, atol=1e-12), key
        assert gradient.any(), key


def test_a_text_tower_with_dropout_is_seen_twice_alike(tmp_path):
    folder = write_text_model(tmp_path / "x", hidden_dropout_prob=0.5)
    t = exact_training("CLIP_NANO8", 2, flags=["--text-model", str(folder)])
    seen, towers_of = [], t.model.forward_features
    t.model.forward_features = lambda **views: seen.append(towers_of(**views)) or seen[-1]
    engine.update(t, views_of(t.model, 4, 2), 0)
    assert torch.equal(seen[0]["text"], seen[2]["text"]) and len(seen) == 4


# ---------------------------------------------------------------------------------------------
# Checkpoints, exports, weights of others


def test_a_checkpoint_opens_alone_in_every_script(trained, tiny, tmp_path, capsys):
    path = trained / "parts/checkpoint.pt"
    model, args = load_model(path)
    assert args.model == "SLIP_NANO8" and isinstance(model.text, hf_text.HFText)
    assert model.preprocessing.tokenizer == "huggingface"
    tokens = model.tokenizer(["a Dog", "a dog"])
    assert tokens.shape == (2, 77) and not torch.equal(tokens[0], tokens[1])
    write_folders(tmp_path / "digits/train", each=2)
    write_folders(tmp_path / "digits/test", each=1)
    change_json(tmp_path / "catalog.json", digits={"path": "digits", "type": "imagefolder"})
    common = f"--catalog {tmp_path}/catalog.json --workers 0 --device cpu".split()
    for script, flags in (
        (eval_zeroshot, ["--resume", path, "--datasets", "digits"]),
        (main_linear, ["--pretrained", path, "--dataset", "digits", "--classifier", "knn"]),
    ):
        flags = map(str, [*flags, *common, "--output-dir", tmp_path / script.__name__])
        script.main(script.get_args_parser().parse_args(list(flags)))
    flags = f"--resume {path} --captions {tiny}/captions.json --root {tiny}/train2017 --workers 0 "
    flags += f"--device cpu --output-dir {tmp_path}"
    eval_retrieval.main(eval_retrieval.get_args_parser().parse_args(flags.split()))
    train(tiny, tmp_path / "more", "--init-from", path, "--text-model", "gone", val="none")
    said = capsys.readouterr().out
    parts = "Hugging Face's text tower and projections, SimCLR head, image tower"
    assert f"initialised from {path}; from: {parts}\n" in said


def test_an_image_tower_of_clip_with_a_new_text_tower(texts, tiny, tmp_path):
    old = train(tiny, tmp_path / "old", model="CLIP_NANO8", val="none")
    flags = ["--init-from", old / "checkpoint.pt", "--text-model", texts["roberta"]]
    flags = ["--model", "CLIP_NANO8", *map(str, flags)]
    _, notes = main.create_model(main.get_args_parser().parse_args(flags))
    assert notes[1].endswith(
        "from: image tower; new: Hugging Face's text tower and projections; left out: text tower "
        "and projections"
    )


def copy_below(path, new):
    new.parent.mkdir(exist_ok=True)
    shutil.copy(path, new)


IMAGES = {  # a row for the image tower; whether open_clip's own ViT is to hold it
    "NANO8": False,
    "clip quick": True,  # QuickGELU, which open_clip's flag then means for the image tower alone
}


@pytest.mark.parametrize("image", IMAGES)
def test_open_clip_opens_an_export(texts, image, tmp_path_factory, hub, monkeypatch):  # noqa: F811
    tmp_path = tmp_path_factory.mktemp("export")
    monkeypatch.setitem(towers.TOWERS, image, {**towers.TOWERS, **ROWS}[image])
    model, text_model = create(texts["roberta"], f"SLIP_{image}")
    source = formats.Source(model, f"SLIP_{image}", towers.TOWERS[image])
    notes = formats.write_open_clip(source, tmp_path, tmp_path)
    assert notes[-1] == formats.MOVED_TEXT and len(notes) == 2 - IMAGES[image]

    peer, _, tokenizer = open_by_open_clip(tmp_path)
    tokens, size = model.tokenizer(TEXTS), model.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer(TEXTS), tokens)
    with torch.no_grad():
        for ours, theirs in (
            (model.encode_text(tokens), peer.encode_text(tokens)),
            (model.encode_image(images), peer.encode_image(images)),
        ):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5) and ours.std() > 0.01

    for path in filter(Path.is_file, tmp_path.rglob("*")):
        hub("org/own", str(path.relative_to(tmp_path)), partial(copy_below, path))
    expected = replace(text_model, weights=None)
    assert open_weights("hf-hub:org/own").tower.text_model == expected
    found = open_weights(tmp_path)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("image_mlp.")}
    assert_same(found.build().state_dict(), kept)
    assert found.name == f"CLIP_{image}" and found.build().preprocessing == model.preprocessing
    assert found.tower.text_model == expected


def test_a_moved_export_and_targets_that_cannot_express_it(texts, tmp_path, monkeypatch, capsys):
    model, text_model = create(texts["bert"])
    state = {"state_dict": model.state_dict(), "text_model": text_model.state_dict()}
    state |= {"args": {"model": "CLIP_NANO8"}, "preprocessing": model.preprocessing.to_dict()}
    torch.save(state, tmp_path / "c.pt")
    for kind in ("open_clip", "timm"):
        call(tmp_path / "c.pt", kind, tmp_path / kind)
    readme = (tmp_path / "open_clip/README.md").read_text()
    assert "- Texts: the tokenizer of bert, 77 tokens, padded\n" in readme
    moved = (tmp_path / "open_clip").rename(tmp_path / "moved")
    for command in readme.split("    python -c ")[1:]:
        command = f"{sys.executable} -c {command.split(chr(10) * 2)[0]}"
        subprocess.run(command, shell=True, check=True, cwd=moved)
    peer, _, _ = open_by_open_clip(moved)
    with torch.no_grad():
        tokens = model.tokenizer(TEXTS)
        assert torch.allclose(peer.encode_text(tokens), model.encode_text(tokens), atol=1e-5)
    with pytest.raises(InputError, match="and the text tower bert, which transformers' CLIPModel"):
        call(tmp_path / "c.pt", "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx(texts, tmp_path):
    model, _ = create(texts["roberta"])
    notes = write_onnx(formats.Source(model, "CLIP_NANO8", towers.TOWERS["NANO8"]), tmp_path, "")
    assert "text.onnx gives the model's embeddings to" in notes[1]
    assert (tmp_path / "text/tokenizer.json").exists() and "folder text" in notes[2]
