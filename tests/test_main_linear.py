"""Classifiers on a frozen tower end to end: results, resume, ranks, what stays frozen, errors."""

import argparse
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from launch import run_script

import features
import layers
import main_linear
from pretrained import load_model
from utils import InputError


def flags(probed, out, *extra):
    given = f"--pretrained {probed}/run/checkpoint.pt --catalog {probed}/catalog.json --workers 0 "
    given += f"--dataset digits --output-dir {out} --device cpu --batch-size 8 --epochs 2"
    return [*given.split(), *map(str, extra)]


def call(probed, out, *extra):
    main_linear.main(main_linear.get_args_parser().parse_args(flags(probed, out, *extra)))


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())["digits"]


def head(out):
    path = out / "linear-digits/checkpoint.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_probe_trains_its_head_alone_and_goes_on(probed, tmp_path, capsys):
    call(probed, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "learning rate 0.003125 by the archived rule" in said
    found = result(tmp_path / "whole", "linear")
    assert (found["images"], found["metric"], found["epochs"]) == (30, "top1", 2)
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert len(found["per_class"]) == 10
    assert set(head(tmp_path / "whole")) == {"weight", "bias"}

    def stop(*args, **options):  # after the first epoch's checkpoint
        raise KeyboardInterrupt

    keep, calls = main_linear.engine.train_one_epoch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            main_linear.engine,
            "train_one_epoch",
            lambda *a, **o: stop() if calls else (calls.append(1), keep(*a, **o))[1],
        )
        with pytest.raises(KeyboardInterrupt):
            call(probed, tmp_path / "parts")
    path = tmp_path / "parts/linear-digits/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["scaler"]  # checkpoints of earlier versions hold none
    torch.save(state, path)
    call(probed, tmp_path / "parts")
    for key, value in head(tmp_path / "whole").items():
        assert torch.equal(head(tmp_path / "parts")[key], value)
    assert result(tmp_path / "parts", "linear") == found
    call(probed, tmp_path / "parts", "--evaluate")
    assert result(tmp_path / "parts", "linear") == found


def test_flags_that_would_not_be_applied_are_refused(probed, tmp_path):
    call(probed, tmp_path)
    settings = (tmp_path / "linear-digits/args.json").read_text()
    for extra, match in (
        (["--lr", 50], "trained with --lr 0.1, not 50.0; give the same, or another output folder"),
        (["--epochs", 3], "trained with --epochs 2, not 3"),
        (["--lr-scaling", "global"], "trained with --lr-scaling 'archived', not 'global'"),
        (["--batch-size", 4], "trained with effective_batch 8, not 4"),
    ):
        with pytest.raises(InputError, match=match):
            call(probed, tmp_path, *extra)
    assert (tmp_path / "linear-digits/args.json").read_text() == settings
    call(probed, tmp_path, "--evaluate", "--epochs", 90, "--batch-size", 16)
    assert result(tmp_path, "linear")["epochs"] == 2


def test_a_tower_that_changed_is_noticed(probed):

    path = probed / "run/checkpoint.pt"
    model, _ = load_model(path)
    before = layers.digests(model.visual.state_dict())
    main_linear.check_frozen(model.visual, before)
    model.visual.norm.bias.data[0] += 1e-6
    with pytest.raises(RuntimeError, match=r"the frozen tower was changed: norm.bias"):
        main_linear.check_frozen(model.visual, before)


def test_features_are_taken_once_and_alike_on_two_ranks(probed, tmp_path, monkeypatch):
    extra = ["--classifier", "knn", "--k", 3]
    call(probed, tmp_path / "one", *extra)
    one = result(tmp_path / "one", "knn-3")
    assert one["images"] == 30
    run = run_script("main_linear.py", flags(probed, tmp_path / "two", *extra), ranks=2)
    assert run.returncode == 0, run.stderr
    assert result(tmp_path / "two", "knn-3") == one
    quick = functools.partial(features.fit_with_search, max_iter=10)
    monkeypatch.setattr(features, "fit_with_search", quick)
    call(probed, tmp_path / "two", "--classifier", "logistic")  # on the features that are there
    assert result(tmp_path / "two", "logistic")["C"] in features.GRID
    assert len(list((tmp_path / "two/features").iterdir())) == 4


def test_features_of_other_pictures_are_others(probed, tmp_path):
    """Folders that are swapped, other labels, a place or split of the same size."""
    import shutil

    root, extra = tmp_path / "set", ["--catalog", tmp_path / "set/catalog.json"]
    shutil.copytree(probed / "digits", root / "digits")
    shutil.copy(probed / "catalog.json", root)
    extra += ["--classifier", "knn", "--k", 1]
    kept = tmp_path / "out/features"

    def count():
        call(probed, tmp_path / "out", *extra)
        return len(list(kept.iterdir()))

    assert [count(), count()] == [4, 4]
    folder = root / "digits/test"
    (folder / "0_class").rename(folder / "x")
    (folder / "1_class").rename(folder / "0_class")
    (folder / "x").rename(folder / "1_class")
    assert count() == 6
    shutil.copytree(folder, root / "digits/other")
    entry = {"path": "digits", "type": "imagefolder", "test": "other"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry}))
    assert count() == 8  # the training part has another entry as well


def test_the_probe_on_two_ranks_by_the_global_rule(probed, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    call(probed, one, "--lr-scaling", "global")
    extra = ["--lr-scaling", "global", "--batch-size", 4]
    run = run_script("main_linear.py", flags(probed, two, *extra), ranks=2)
    assert run.returncode == 0, run.stderr
    for key, value in head(one).items():
        assert torch.allclose(head(two)[key], value, atol=1e-6), key
    assert result(two, "linear")["accuracy"] == result(one, "linear")["accuracy"]


def test_mixed_precision_is_of_the_tower_alone(probed, tmp_path):
    call(probed, tmp_path / "fp32")
    call(probed, tmp_path / "bf16", "--precision", "bf16")
    fp32, bf16 = head(tmp_path / "fp32"), head(tmp_path / "bf16")
    for key, value in fp32.items():
        assert bf16[key].dtype == torch.float32 and not torch.equal(bf16[key], value)
        assert torch.allclose(bf16[key], value, atol=1e-3), key
    kinds = []
    model = SimpleNamespace(visual=torch.nn.Linear(4, 4), num_features=4, normalize=None)
    probe = main_linear.Probe(model, 2)
    probe.head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    probe.tower.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with main_linear.devices.Precision("bf16", torch.device("cpu")).autocast():
        probe(torch.ones(1, 4), torch.zeros(1))
    assert kinds == [torch.bfloat16, torch.float32]


def test_the_archived_rule_divides_by_the_number_of_gpus():
    args = argparse.Namespace(lr=0.1, batch_size=128)
    assert main_linear.archived_lr(args, 8) == pytest.approx(0.00625)
    assert main_linear.global_lr(args, 8) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "extra, match",
    [
        (["--dataset", "x"], "unknown dataset 'x'; choose from digits, mnist"),
        (["--dataset", "imagenet"], "unknown dataset 'imagenet'; choose from digits"),
        (["--dataset", "mnist"], "nowhere.*; check the folder"),
        (["--batch-size", 41], "batch size 41 on 1 ranks is more than the 40 training images"),
        (["--evaluate"], "--evaluate: .*checkpoint.pt is absent; train the probe"),
        (["--pretrained", "none.pt"], "weights 'none.pt' is absent"),
        (["--classifier", "svm"], "invalid choice: 'svm'"),
        (["--temperature", "0.001"], "0.001 must be 0.002 or more"),
    ],
)
def test_bad_input(probed, tmp_path, extra, match):
    with pytest.raises(InputError, match=match):
        call(probed, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classifier", ["knn", "logistic", "linear"])
def test_weights_that_are_not_finite_score_nothing(classifier, probed, tmp_path):
    state = torch.load(probed / "run/checkpoint.pt", weights_only=True)
    state["state_dict"]["visual.norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "c.pt")
    match = "loss is nan at" if classifier == "linear" else "outputs are not finite"
    with pytest.raises(InputError, match=match):
        call(probed, tmp_path, "--pretrained", tmp_path / "c.pt", "--classifier", classifier)


def test_a_probe_of_other_classes_or_another_tower_is_refused(probed, tmp_path):
    call(probed, tmp_path)
    other = torch.load(probed / "run/checkpoint.pt", weights_only=True)
    torch.save({**other, "epoch": 9}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="began from another pretrained checkpoint"):
        call(probed, tmp_path, "--pretrained", tmp_path / "other.pt")
    path = tmp_path / "linear-digits/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["bias"] = torch.zeros(7)
    torch.save(state, path)
    with pytest.raises(InputError, match="of another shape: bias.*check --dataset"):
        call(probed, tmp_path)
