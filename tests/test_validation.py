"""Validation while training: several labelled sets, held-out pairs, one and two ranks."""

import json

import pytest
from helpers import rows, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import InputError


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
