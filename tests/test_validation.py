"""Validation while training: several labelled sets, held-out pairs, one and two ranks."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import PeakMemory, rows, train, train_flags, weights, write_coco
from launch import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_retrieval
import pretrained
import validation
from captions import load_captions
from evaluation import Evaluation
from infra import devices
from losses import CLIPLoss
from transforms import CenterCrop
from utils import InputError

FP32 = devices.Precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def catalog(tiny):
    """A catalog of two sets, of the same pictures."""
    entry = {"path": "digits", "type": "imagefolder", "train": "train", "test": "test"}
    path = tiny / "two.json"
    path.write_text(json.dumps({"digits": entry, "mnist": entry}))
    return path


def test_several_sets_are_scored_and_the_first_chooses_the_best(tiny, catalog, tmp_path, capsys):
    """A set has the score that it has alone, wherever it stands."""
    flags = ["--catalog", catalog, "--val-dataset", "mnist", "digits"]
    train(tiny, tmp_path / "both", *flags, model="CLIP_NANO8", epochs=2)
    said = capsys.readouterr().out
    train(tiny, tmp_path / "one", model="CLIP_NANO8", epochs=2)
    both, one = rows(tmp_path / "both"), rows(tmp_path / "one")
    for key in ("accuracy", "acc1", "acc5"):
        assert [r[f"test_digits_{key}"] for r in both] == [r[f"test_{key}"] for r in one]
    assert [r["train_loss"] for r in both] == [r["train_loss"] for r in one]
    best = max(row["test_accuracy"] for row in both)
    assert f"epoch 1: mnist {both[1]['test_accuracy']:.2f}, best {best:.2f}" in said
    assert f"epoch 1: digits {both[1]['test_digits_accuracy']:.2f}\n" in said
    scalars = EventAccumulator(str(tmp_path / "both")).Reload().Scalars("epoch/test_digits_acc1")
    assert [s.value for s in scalars] == pytest.approx([r["test_digits_acc1"] for r in both])

    train(tiny, tmp_path / "both", *flags, "--evaluate", model="CLIP_NANO8")
    said = capsys.readouterr().out
    assert f"mnist: top1 {both[1]['test_accuracy']:.2f}, 30 images of test" in said
    assert f"digits: top1 {both[1]['test_digits_accuracy']:.2f}, 30 images of test" in said


@pytest.mark.parametrize(
    "names, match",
    [
        (["digits", "mnist", "digits"], "--val-dataset names a set twice: digits mnist digits"),
        (["digits", "none"], "--val-dataset: unknown dataset 'none'; choose from digits, mnist"),
    ],
)
def test_bad_choices_of_sets(tiny, catalog, tmp_path, names, match):
    with pytest.raises(InputError, match=match):
        train(tiny, tmp_path / "out", "--catalog", catalog, "--val-dataset", *names)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# Held-out pairs


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The folder of 12 pairs, two captions each; the images 3 and 7 cannot be read."""
    root = tmp_path_factory.mktemp("held")
    write_coco(root, images=12)
    for i in (3, 7):
        (root / f"train2017/{i:012d}.jpg").write_bytes(b"broken")
    return root


def pair_flags(held_out, fraction=0.2):
    flags = ["--val-metadata", held_out / "captions.json", "--val-root", held_out]
    return [*flags, "--max-bad-fraction", fraction]


def test_held_out_pairs_on_one_and_two_ranks(tiny, held_out, tmp_path, capsys):
    """The same numbers as a plain count of all scores, and on two ranks as on one."""
    options = {"model": "CLIP_NANO8", "epochs": 2, "val": "none"}
    train(tiny, tmp_path, *pair_flags(held_out), "--eval-freq", 2, **options)
    said = capsys.readouterr().out
    log = rows(tmp_path)
    assert not any(key.startswith("val_") for key in log[0])
    got = {key.removeprefix("val_"): x for key, x in log[1].items() if key.startswith("val_")}
    assert not (tmp_path / "checkpoint_best.pt").exists()
    assert (got["images"], got["captions"], got["bad_images"]) == (10, 20, 2)
    assert said.count("held-out pairs, left out: ") == 2
    assert all(said.count(f"{i:012d}.jpg is empty, or no image") == 1 for i in (3, 7))
    assert f"epoch 1: held-out pairs: loss {got['loss']:.4f}, 10 images, 20 captions; " in said

    model, _ = pretrained.load_model(tmp_path / "checkpoint.pt")
    images, texts, view = [], [], CenterCrop.of(model.preprocessing)
    for path, captions in load_captions("coco", held_out / "captions.json"):
        if path[-5] not in "37":
            images.append(view(validation.decode_image((held_out / path).read_bytes(), path)))
            texts += captions
    with torch.no_grad():
        image = F.normalize(model.encode_image(model.normalize(torch.stack(images))), dim=-1)
        text = F.normalize(model.encode_text(model.tokenizer(texts)), dim=-1)
        owners = torch.arange(10).repeat_interleave(2)
        loss = {"image_embed": image, "text_embed": text[::2]}
        loss = CLIPLoss()(loss | {"logit_scale": model.logit_scale.exp()})["loss"]
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = eval_retrieval.retrieval_scores(image, text, owners)
    assert {key: got[key] for key in expected} == pytest.approx(expected)

    flags = train_flags(tiny, tmp_path, *pair_flags(held_out), "--evaluate", **options)
    two = run_script("main.py", flags, ranks=2)
    assert two.returncode == 0, two.stderr
    lines = [line.partition(": ")[2] for line in said.splitlines() if "1: held-out" in line]
    assert len(lines) == 3 and all(two.stdout.count(line + "\n") == 1 for line in lines)
    assert two.stdout.count("held-out pairs, left out: ") == 2


def test_pairs_that_are_trained_on_are_told(tiny, tmp_path, capsys):
    options = {"model": "CLIP_NANO8", "val": "none"}
    train(tiny, tmp_path, "--val-metadata", tiny / "digits" / ".." / "captions.json", **options)
    assert "note: --val-metadata is --metadata: its pairs are trained on" in capsys.readouterr().out


def test_the_loss_is_the_mean_over_batches_of_a_stated_size(monkeypatch):
    monkeypatch.setattr(validation, "LOSS_BATCH", 4)
    image, text = F.normalize(torch.randn(2, 10, 6, dtype=torch.float64), dim=-1)
    got = validation.contrastive_loss(image, text, torch.tensor(5.0))
    total = 0.0
    for part in (slice(0, 4), slice(4, 7), slice(7, 10)):  # of like size
        logits = 5 * image[part] @ text[part].T
        diagonal = logits.log_softmax(1).diag() + logits.log_softmax(0).diag()
        total -= diagonal.sum().item() / 2
    assert got == pytest.approx(total / 10)


def test_memory_grows_with_the_pairs_alone(monkeypatch):
    """After the embeddings: the loss and the ranks."""

    class Rows(validation.HeldOutPairs):
        def __init__(self, n):
            self.pairs, self.max_bad_fraction = [("x", ["a"])] * n, 0.0

    def unit(n):
        return F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1)

    def images(model, pairs, evaluation):
        return unit(len(pairs)), torch.arange(len(pairs))

    monkeypatch.setattr(validation, "LOSS_BATCH", 64)
    monkeypatch.setattr(eval_retrieval, "CHUNK", 64)
    monkeypatch.setattr(validation, "embed_images", images)
    monkeypatch.setattr(validation, "embed_texts", lambda model, texts, *_: unit(len(texts)))
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.ones(()))

    def peak(n):
        with PeakMemory() as memory:
            validation.score_pairs(model, Rows(n), Evaluation(FP32), print)
        return memory.peak

    assert peak(2048) < 5 * peak(512)  # all scores at once: 16 times


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--max-bad-fraction", 0.1], "2 of the 12 held-out images cannot be read, .* 0.1; the fi"),
        (["--val-root", "."], "none of the first 12 held-out .*; check the root; the first: image"),
        (["--val-root", "nowhere"], "--val-metadata: 'nowhere' is not a folder; give the folder"),
        (["--val-source", "laion"], "--val-metadata: unknown dataset 'laion'; choose from"),
        (["--val-metadata", "no.json"], "--val-metadata: .*no.json: No such file"),
        (["--model", "SIMCLR_NANO8"], "--val-metadata: SIMCLR_NANO8 has no text to score; omit"),
    ],
)
def test_bad_held_out_pairs(tiny, held_out, tmp_path, flags, match):
    with pytest.raises(InputError, match=match) as error:
        train(tiny, tmp_path / "out", *pair_flags(held_out), *flags, model="CLIP_NANO8", val="none")
    assert "\n" not in str(error.value)
    # What is found after an epoch does not cost it; what is found before leaves nothing behind.
    is_late = "--max-bad-fraction" in flags
    assert (tmp_path / "out/checkpoint.pt").exists() == is_late
    if is_late:
        assert weights(tmp_path / "out")["epoch"] == 1
