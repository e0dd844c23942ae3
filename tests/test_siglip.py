"""SigLIP's bias, and ids that travel with the samples: models, files, loaders, whole runs."""

import json
import math
import shutil
from hashlib import blake2b

import pytest
import torch
from helpers import (
    assert_equal,
    encoded,
    rows,
    step_losses,
    train,
    train_in_two_lives,
    weights,
    write_coco,
    write_tar,
)
from test_formats import ROWS, embed_ours, open_by_open_clip, source_of

import datasets
import formats
import lanes
import main
import models
import warmup
from infra import compilation, distributed
from preprocessing import Preprocessing
from pretrained import load_model, open_weights
from stream_shards import open_stream
from tokenizer import SimpleTokenizer
from utils import InputError


def create(flags):
    args = main.get_args_parser().parse_args(["--batch-size", "8", *flags.split()])
    return main.create_model(args)[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "flags, bias",
    [
        ("", lambda ranks: -10),
        ("--init-logit-bias -3.5", lambda ranks: -3.5),
        ("--init-logit-bias auto --update-freq 4", lambda ranks: -math.log(8 * ranks - 1)),
        (
            "--init-logit-bias auto --update-freq 4 --accum exact",
            lambda ranks: -math.log(32 * ranks - 1),
        ),
        ("--init-logit-bias auto --batch-size 1", lambda ranks: -math.log(max(ranks - 1, 1))),
    ],
)
def test_where_scale_and_bias_start(flags, bias, ranks, monkeypatch):
    monkeypatch.setattr(distributed, "get_world_size", lambda: ranks)
    model = create(f"--model CLIP_NANO8 --clip-loss sigmoid {flags}")
    assert model.logit_bias.item() == pytest.approx(bias(ranks), rel=1e-6)
    assert model.logit_scale.exp().item() == pytest.approx(10, rel=1e-6)


def test_the_bias_is_one_parameter_more_and_nothing_else(monkeypatch):
    """It is no matrix, so no weight decay; the others are drawn as without it."""
    states = []
    for flags in ("", "--clip-loss sigmoid"):
        torch.manual_seed(0)
        states.append(create(f"--model SLIP_NANO8 --ssl-mlp-dim 8 --ssl-emb-dim 8 {flags}"))
    softmax, sigmoid = (dict(model.named_parameters()) for model in states)
    assert [key for key in sigmoid if key != "logit_bias"] == list(softmax)
    assert [key for key in sigmoid if "." not in key][-1] == "logit_bias"
    for key in softmax.keys() - {"logit_scale"}:
        assert torch.equal(softmax[key], sigmoid[key]), key


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--model SIMCLR_NANO8 --clip-loss sigmoid", "sigmoid loss: the method has no text; choos"),
        ("--model CLIP_NANO8 --init-logit-bias -5", "logit bias -5.0: the softmax loss has none; "),
        ("--model SIMCLR_NANO8 --init-logit-bias auto", "logit bias auto: the softmax loss has no"),
        ("--init-logit-bias inf", "argument --init-logit-bias: invalid"),
        ("--init-logit-bias ten", "argument --init-logit-bias: invalid"),
        ("--clip-loss hinge", "argument --clip-loss: invalid choice: 'hinge'"),
        ("--duplicates drop", "argument --duplicates: invalid choice: 'drop'"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, match):
    with pytest.raises(InputError, match=match) as error:
        create(flags)
    assert "\n" not in str(error.value)


def test_help_tells_of_each_flag():
    text = " ".join(main.get_args_parser().format_help().split())
    for flag in ("--clip-loss {softmax,sigmoid}", "--init-logit-bias B", "{keep,mask,share}"):
        assert flag in text
    assert "always with the full gradient" in text and "ln(1 / (batch - 1))" in text


# ---------------------------------------------------------------------------------------------
# Files


def biased(name):
    source = source_of(name)
    source.model.add_logit_bias(-4.5)
    return source


@pytest.mark.parametrize("name", ["CLIP_clip gelu", "SLIP_timm"])
def test_open_clip_opens_an_export_with_the_bias(name, tmp_path, monkeypatch):
    monkeypatch.setitem(models.TOWERS, name.partition("_")[2], ROWS[name.partition("_")[2]])
    source = biased(name)
    formats.write_open_clip(source, tmp_path, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == -4.5
    peer, *_ = open_by_open_clip(tmp_path)
    assert peer.logit_bias.item() == -4.5
    assert peer.logit_scale.item() == pytest.approx(math.log(10))
    back, _ = load_model(tmp_path)
    kept = {k: v for k, v in source.model.state_dict().items() if not k.startswith("image_mlp.")}
    assert_equal(dict(back.state_dict()), kept)
    assert torch.equal(embed_ours(back), embed_ours(source.model))


def test_hugging_face_gets_all_but_the_bias_and_a_note(tmp_path):
    from transformers import CLIPModel

    source = biased("CLIP_clip")
    note = formats.write_huggingface(source, tmp_path, tmp_path)[-1]
    assert "plus the bias, -4.5000" in note
    peer, loading = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(peer.logit_scale, source.model.logit_scale)


def test_weights_of_open_clips_siglip_flag_are_found_by_their_shapes(tmp_path, monkeypatch):
    import layouts

    monkeypatch.setattr(layouts, "CLIP_TOWERS", {"small": ROWS["clip gelu"]})
    state = biased("CLIP_clip gelu").model.state_dict()
    theirs = layouts.to_open_clip(state, is_native=True)
    assert theirs["logit_bias"].item() == -4.5
    ours = layouts.from_open_clip(theirs)
    assert_equal(ours, dict(state))
    assert layouts.match_tower(ours) == "small"


# ---------------------------------------------------------------------------------------------
# Ids


def write_duplicates(root):
    """A COCO set of 16 images, 4 of them equal, with 5 different captions."""
    path = write_coco(root)
    for number in (5, 6, 7):
        shutil.copy(root / f"train2017/{4:012d}.jpg", root / f"train2017/{number:012d}.jpg")
    annotations = [{"image_id": i, "caption": f"the number {i % 5}"} for i in range(16)]
    path.write_text(json.dumps({"annotations": annotations}))
    return path


def number(data):
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


FORM = Preprocessing(image_size=32)


@pytest.mark.parametrize("augment", ["cpu", "device"])
def test_ids_are_those_of_captions_and_images_alone(tmp_path, augment):
    import captions

    pairs = captions.load_captions("coco", write_duplicates(tmp_path))
    views = ("image", "text", "aug1", "aug2")
    batches = []
    for names in (views, (*views, "ids"), ("aug1", "aug2", "ids")):
        dataset = datasets.CaptionDataset(pairs, str(tmp_path), names, FORM, 0, augment)
        collate = datasets.Collate(SimpleTokenizer())
        batches.append(collate([dataset[0, (i,)] for i in range(16)]))
    keep, with_text, without = batches
    ids, images = with_text.pop("ids"), [f"train2017/{i:012d}.jpg" for i in range(16)]
    assert ids.dtype == torch.int64
    expected = [
        [number(f"the number {i % 5}".encode()), number((tmp_path / image).read_bytes())]
        for i, image in enumerate(images)
    ]
    assert ids.tolist() == expected and len(set(ids[:, 1].tolist())) == 13
    assert without["ids"].tolist() == [[image, image] for _, image in expected]
    assert_equal(with_text, keep)  # the samples are the same


def test_streams_have_the_same_ids(tmp_path):
    members = []
    for i in range(6):
        members += [(f"{i}.jpg", encoded(i // 2)), (f"{i}.txt", b"one" if i else b"two")]
    path = write_tar(tmp_path / "0.tar", members)
    stream = open_stream("webdataset", f"pipe:cat {path}", (), 6, False, "")
    dataset = lanes.StreamDataset(stream, ("image", "text", "ids"), FORM, 0)
    samples = [dataset[0, 0, 1, place] for place in range(6)]
    for sample in samples:
        image = encoded(int(sample["source"]["path"].rpartition("/")[2][0]) // 2)
        assert sample["ids"].tolist() == [number(sample["text"].encode()), number(image)]
    assert len({sample["ids"][1].item() for sample in samples}) == 3
    dataset.close()


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "model, flags",
    [
        ("SLIP_NANO8", "--clip-loss sigmoid --duplicates share --accum exact --update-freq 2"),
        ("SLIP_NANO8", "--duplicates mask"),
        ("SIMCLR_NANO8", "--duplicates share"),
    ],
)
def test_a_run_resumes_bit_for_bit(model, flags, tiny, tmp_path):
    options = {"epochs": 2, "val": "none", "model": model}
    flags = [*flags.split(), "--root", tmp_path, "--metadata", write_duplicates(tmp_path)]
    whole = train(tiny, tmp_path / "whole", *flags, **options)
    parts = train_in_two_lives(tiny, tmp_path / "parts", *flags, **options)
    assert step_losses(parts) == step_losses(whole)
    for key in ("state_dict", "optimizer"):
        assert_equal(weights(parts)[key], weights(whole)[key])
    name = "train_ssl_duplicates" if model.startswith("SIMCLR") else "train_duplicates"
    assert 0 < rows(parts)[0][name] < 100
    if "sigmoid" in flags:
        assert (
            rows(parts)[-1]["logit_bias"]
            == weights(parts)["state_dict"]["logit_bias"].item()
            != -10
        )
        with pytest.raises(InputError, match="trained with --clip-loss 'sigmoid', not 'softmax'"):
            train(tiny, parts, *flags[2:], **options)


def test_a_run_starts_from_weights_of_the_other_loss(tiny, tmp_path):
    options = {"model": "CLIP_NANO8", "val": "none"}
    sigmoid = ["--clip-loss", "sigmoid"]
    softmax = train(tiny, tmp_path / "softmax", **options)
    start = ["--init-from", softmax / "checkpoint.pt", "--lr", 1e-12, "--lr-start", 0, "--wd", 0]
    both = train(tiny, tmp_path / "both", *start, "--lr-end", 0, *sigmoid, **options)
    old, new = (weights(folder)["state_dict"] for folder in (softmax, both))
    assert new.pop("logit_bias").item() == -10
    for key, value in old.items():
        assert torch.allclose(new[key], value, atol=1e-6), key

    model, args = load_model(both / "checkpoint.pt")
    assert args.clip_loss == "sigmoid" and model.logit_bias.item() == -10
    found = open_weights(both / "checkpoint.pt")
    assert found.initialise(models.create_model("CLIP_NANO8")).endswith(
        "left out: bias of the sigmoid loss"
    )


def test_compiled_losses_take_ids_of_the_warm_up(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "LENGTHS", ())
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    flags = ["--root", tmp_path, "--metadata", write_duplicates(tmp_path), "--duplicates", "mask"]
    runs = [
        train(tiny, tmp_path / flag, *flags, flag, val="none", model="CLIP_NANO8")
        for flag in ("--no-compile", "--compile")
    ]
    assert "torch.compile failed" not in capsys.readouterr().out
    assert step_losses(runs[1]) == pytest.approx(step_losses(runs[0]), rel=1e-5)
