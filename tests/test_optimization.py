"""Groups and rates, schedules, averaged weights: by hand, by open_clip's, in runs and on ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_equal, exact_training, rows, step_losses, train, views_of, weights
from test_resume import assert_same_run

import engine
import eval_zeroshot
import export
import main
import models
import optimization
from infra import devices
from infra.checkpoint_manager import CheckpointManager
from optimization import cosine_scheduler
from utils import InputError

FP32 = devices.Precision("fp32", torch.device("cpu"))


def parse(*flags):
    return main.get_args_parser().parse_args(list(map(str, flags)))


# ---------------------------------------------------------------------------------------------
# Groups


def test_weight_decay_spares_vectors_and_scalars():
    model = models.create_model("SLIP_VITTINY8", 32, 16)
    decayed, rest = optimization.param_groups(model, 0.5)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 3, 4}
    assert {p.ndim for p in rest["params"]} == {0, 1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    # Optimizer states go by position: the archived code's order.
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in (decayed, rest) for p in group["params"]]
    block = "transformer.resblocks.0."
    assert [n for n in order if not n.startswith(("visual", "transformer.resblocks.1"))] == [
        "positional_embedding",
        "image_projection",
        "text_projection",
        f"{block}attn.in_proj_weight",
        f"{block}attn.out_proj.weight",
        f"{block}mlp.c_fc.weight",
        f"{block}mlp.c_proj.weight",
        "token_embedding.weight",
        "image_mlp.layer1.weight",
        "image_mlp.layer2.weight",
        "image_mlp.layer3.weight",
        "logit_scale",
        f"{block}attn.in_proj_bias",
        f"{block}attn.out_proj.bias",
        f"{block}ln_1.weight",
        f"{block}ln_1.bias",
        f"{block}mlp.c_fc.bias",
        f"{block}mlp.c_proj.bias",
        f"{block}ln_2.weight",
        f"{block}ln_2.bias",
        "ln_final.weight",
        "ln_final.bias",
        "image_mlp.layer1.bias",
        "image_mlp.bn1.weight",
        "image_mlp.bn1.bias",
        "image_mlp.layer2.bias",
        "image_mlp.bn2.weight",
        "image_mlp.bn2.bias",
        "image_mlp.layer3.bias",
    ]
    assert order.index("visual.cls_token") < order.index("transformer.resblocks.0.mlp.c_fc.weight")


def test_without_flags_the_groups_are_the_archived_two():
    model = models.create_model("SLIP_NANO8", 32, 16)
    scales = optimization.rate_scales(model, parse())
    assert scales == {}
    groups = optimization.param_groups(model, 0.1, scales)
    assert [list(group) for group in groups] == [["params", "weight_decay"]] * 2
    same = optimization.rate_scales(model, parse("--lr-image", 3e-3))
    assert [list(g) for g in optimization.param_groups(model, 0.1, same)] == [list(groups[0])] * 2


def rates_of(name, *flags):
    """{parameter: peak rate}, of the groups as the optimizer has them."""
    model, args = models.create_model(name, 32, 16), parse(*flags)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimization.param_groups(model, 0.1, optimization.rate_scales(model, args))
    assert [g["weight_decay"] for g in groups] == sorted(g["weight_decay"] for g in groups)[::-1]
    return {names[id(p)]: args.lr * g.get("lr_scale", 1) for g in groups for p in g["params"]}


def test_rates_fall_from_the_projections_down_in_both_towers():
    flags = ["--lr", 1e-2, "--lr-image", 1e-3, "--lr-text", 4e-3, "--layer-decay", 0.5]
    rates = rates_of("SLIP_NANO8", *flags)
    expected = {"logit_scale": 1e-2, "image_mlp.layer1.weight": 1e-2}
    expected |= {"image_projection": 1e-3, "visual.norm.weight": 1e-3}
    expected |= {"visual.blocks.1.mlp.fc1.weight": 5e-4, "visual.blocks.0.norm1.bias": 2.5e-4}
    expected |= {"visual.cls_token": 1.25e-4, "visual.patch_embed.proj.bias": 1.25e-4}
    expected |= {"text_projection": 4e-3, "ln_final.bias": 4e-3}
    expected |= {"transformer.resblocks.0.attn.in_proj_bias": 2e-3}
    expected |= {"token_embedding.weight": 1e-3, "positional_embedding": 1e-3}
    assert {name: rates[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(rates) == len(dict(models.create_model("SLIP_NANO8", 32, 16).named_parameters()))


def test_one_towers_rate_leaves_the_others():
    rates = rates_of("CLIP_NANO8", "--lr-text", 1e-3)
    found = {name for name, rate in rates.items() if rate == pytest.approx(1e-3)}
    assert {"text_projection", "token_embedding.weight", "ln_final.weight"} <= found
    assert {rates[name] for name in rates.keys() - found} == {3e-3} and "logit_scale" not in found


@pytest.mark.parametrize(
    "model, flags, match",
    [
        ("SIMCLR_NANO8", ["--lr-text", 1], "rate 1 of the text tower, which is not there; omit"),
        ("CLIP_NANO8", ["--lr-image", 1, "--lock-image"], "rate 1 of the image tower.* is locked"),
        ("CLIP_NANO8", ["--schedule", "constant-cooldown"], "say how many epochs the cool-down"),
        ("CLIP_NANO8", ["--cooldown-epochs", 2], "schedule cosine has no cool-down; choose"),
        ("CLIP_NANO8", ["--warmup-steps", 251], "warm-up of 251 updates exceeds training of 250"),
        (
            "CLIP_NANO8",
            ["--schedule", "constant-cooldown", "--cooldown-epochs", 25],
            "warm-up of 1 epochs and cool-down of 25 epochs exceed training of 25 epochs; lower",
        ),
        ("CLIP_NANO8", ["--warmup-steps", 5, "--warmup-epochs", 1], "not allowed with argument"),
        ("CLIP_NANO8", ["--ema-decay", 1], "--ema-decay: 1 must be 0 or more and below 1"),
        ("CLIP_NANO8", ["--schedule", "linear"], "invalid choice: 'linear' .choose from 'cosine'"),
    ],
)
def test_flags_that_do_not_fit(model, flags, match):
    with pytest.raises(InputError, match=match) as error:
        main.create_training(models.create_model(model, 8, 8), FP32, 10, parse(*flags))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Schedules


def test_schedule_equals_the_archived_code(reference):
    args = reference["schedule"]["args"]
    assert np.allclose(cosine_scheduler(**args), reference["schedule"]["values"], rtol=1e-12)


def test_schedule_may_be_all_or_no_warmup():
    assert len(cosine_scheduler(1.0, 0.1, 2, 5, 2, 0.0)) == 10
    assert cosine_scheduler(1.0, 0.1, 2, 5)[0] == 1.0
    with pytest.raises(InputError, match="warm-up of 3 epochs exceeds training of 2"):
        cosine_scheduler(1.0, 0.1, 2, 5, 3)


@pytest.mark.parametrize(
    "kind, end", [("cosine", 0.0), ("constant", 0.0), ("constant-cooldown", 1e-5)]
)
def test_schedules_are_open_clips(kind, end):
    """Its warm-up starts at lr / steps, which is a flag here."""
    from open_clip_train import scheduler

    sink = SimpleNamespace(param_groups=[])
    theirs = {
        "cosine": scheduler.cosine_lr(sink, 5e-4, 30, 250),
        "constant": scheduler.const_lr(sink, 5e-4, 30, 250),
        "constant-cooldown": scheduler.const_lr_cooldown(sink, 5e-4, 30, 250, 50, 1.0, end),
    }
    flags = ["--epochs", 25, "--lr", 5e-4, "--lr-start", 5e-4 / 30, "--lr-end", end]
    flags += ["--warmup-steps", 30, "--schedule", kind]
    flags += ["--cooldown-epochs", 5] if kind == "constant-cooldown" else []
    ours = optimization.create_schedule(parse(*flags), 10)
    np.testing.assert_allclose(ours, [theirs[kind](step) for step in range(250)], rtol=1e-12)


def test_the_default_schedule_is_the_archived_one_to_the_bit():
    args = parse("--epochs", 7, "--warmup-epochs", 2)
    archived = cosine_scheduler(args.lr, args.lr_end, 7, 11, 2, args.lr_start)
    assert np.array_equal(optimization.create_schedule(args, 11), archived)
    steps = parse("--epochs", 7, "--warmup-steps", 22)
    assert np.array_equal(optimization.create_schedule(steps, 11), archived)
    assert len(optimization.create_schedule(parse("--warmup-steps", 0), 11)) == 25 * 11


def test_a_constant_run_is_lengthened_and_then_cooled_down(tiny, tmp_path):
    """To the bits of a run that had known from the beginning."""
    options, parts = {"val": "none", "model": "CLIP_NANO8"}, tmp_path / "parts"
    constant = ["--schedule", "constant"]
    cooldown = ["--schedule", "constant-cooldown", "--cooldown-epochs", 1]
    train(tiny, parts, *constant, epochs=1, **options)
    train(tiny, parts, *constant, epochs=2, **options)
    whole = train(tiny, tmp_path / "constant", *constant, epochs=2, **options)
    assert_same_run(parts, whole)
    train(tiny, parts, *cooldown, epochs=3, **options)
    whole = train(tiny, tmp_path / "cooldown", *cooldown, epochs=3, **options)
    assert_same_run(parts, whole)
    assert [row["lr"] for row in rows(whole)] == pytest.approx([1e-3, 1e-3, 1e-5 + 0.25 * 99e-5])


# ---------------------------------------------------------------------------------------------
# Averaged weights


def test_the_average_is_that_of_the_weights_after_each_update():
    t = exact_training("SLIP_NANO8", 1, flags=["--ema-decay", "0.75", "--lr", "1e-2"])
    expected, batches = {k: x.clone() for k, x in t.model.state_dict().items()}, None
    for step in range(3):
        t.schedule, batches = np.full(3, 1e-2), batches or views_of(t.model, 8, 1)
        engine.update(t, batches, step)
        for key, x in t.model.state_dict().items():
            mean = 0.75 * expected[key] + 0.25 * x if x.is_floating_point() else x.clone()
            expected[key] = mean
    average = t.average.module.state_dict()
    assert not torch.equal(average["image_projection"], t.model.image_projection)
    for key, x in expected.items():
        assert torch.allclose(average[key], x, rtol=1e-9), key
    assert not t.average.module.training


def test_an_update_that_is_left_out_leaves_the_average():
    t = exact_training("CLIP_NANO8", 1, flags=["--ema-decay", "0.5", "--skip-nonfinite", "1"])
    t.schedule, batches = np.full(2, 1e-2), views_of(t.model, 8, 1)
    engine.update_if_finite(t, batches, 0)
    before = {key: x.clone() for key, x in t.average.module.state_dict().items()}
    batches[0]["image"][0] = torch.nan
    _, is_taken = engine.update_if_finite(t, batches, 1)
    assert not is_taken
    assert_equal(t.average.module.state_dict(), before)


@pytest.mark.parametrize("k", [1, 2])
def test_two_ranks_have_the_weights_and_average_of_one_process(k, two_ranks):
    """After updates with locks, rates by part and layer decay."""
    expected = two_ranks["one"]["updated"][0]
    for rank in ("one", "rank0", "rank1"):
        got = two_ranks[rank]["updated"][k - 1]
        for part in ("weights", "ema"):
            for key, x in expected[part].items():
                close = torch.allclose(got[part][key], x, rtol=1e-7, atol=1e-9)
                assert close, (part, key)


@pytest.fixture(scope="module")
def averaged(tiny, tmp_path_factory):
    """A run of one epoch with an average."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    return train(tiny, folder, "--ema-decay", 0.5, "--lr", 1e-2, "--warmup-steps", 0)


def test_the_average_is_saved_and_validated_beside_the_weights(averaged, capsys):
    state, row = weights(averaged), rows(averaged)[0]
    assert state["ema"].keys() == state["state_dict"].keys()
    for key in ("accuracy", "acc1", "acc5"):
        assert 0 <= row[f"ema_test_{key}"] <= 100
    best = torch.load(averaged / "checkpoint_best.pt", weights_only=True)
    assert best["best_acc1"] == row["test_accuracy"]  # the weights choose it


def test_a_run_does_not_resume_with_other_groups(tiny, averaged):
    with pytest.raises(InputError, match="another model; check --model, the locks and the rates"):
        train(tiny, averaged, "--ema-decay", 0.5, "--layer-decay", 0.5, epochs=2)


def test_a_checkpoint_without_an_average_starts_one_from_its_weights(tiny, tmp_path, capsys):
    options = {"val": "none", "model": "CLIP_NANO8"}
    train(tiny, tmp_path, epochs=1, **options)
    first = weights(tmp_path)["state_dict"]
    train(tiny, tmp_path, "--ema-decay", 0.999999, epochs=2, **options)
    said = capsys.readouterr().out
    assert "the checkpoint holds no average of weights: it starts from its weights" in said
    for key, x in weights(tmp_path)["ema"].items():
        assert torch.allclose(x, first[key], rtol=1e-3, atol=1e-6), key


def test_an_average_that_is_not_finite_is_not_saved(tiny, tmp_path, monkeypatch, capsys):
    update = optimization.Average.update

    def spoil(self):
        update(self)
        self.module.image_projection.data[0, 0] = torch.inf

    monkeypatch.setattr(optimization.Average, "update", spoil)
    monkeypatch.setattr("infra.checkpoint_manager.RETRIES", ())
    with pytest.raises(InputError, match="image_projection is not finite"):
        train(tiny, tmp_path, "--ema-decay", 0.5, val="none", model="CLIP_NANO8")


def test_the_average_is_exported_and_scored(tiny, averaged, tmp_path, capsys):
    def run_export(*flags):
        flags = ["--resume", averaged / "checkpoint.pt", "--format", "open_clip", *flags]
        flags += ["--output", tmp_path / "out"]
        export.main(export.get_args_parser().parse_args(list(map(str, flags))))

    run_export("--ema")
    assert "averages over the training's updates" in (tmp_path / "out/README.md").read_text()
    flags = ["--resume", tmp_path / "out", "--datasets", "digits", "--catalog"]
    flags += [tiny / "catalog.json", "--device", "cpu", "--workers", 0, "--output-dir", tmp_path]
    eval_zeroshot.main(eval_zeroshot.get_args_parser().parse_args(list(map(str, flags))))
    said = capsys.readouterr().out
    assert f"{rows(averaged)[0]['ema_test_acc1']:.2f}" in said
    state = weights(averaged)
    del state["ema"]
    torch.save(state, averaged / "checkpoint.pt")
    with pytest.raises(InputError, match="weights .*: it holds no averaged weights, only its weig"):
        run_export("--ema")


# ---------------------------------------------------------------------------------------------
# Resume

LOCKS = "--lock-image --lock-image-unlocked-groups 2 --lock-text --lock-text-unlocked-layers 1"
CASES = {
    "locks": f"{LOCKS} --update-freq 2 --accum exact --batch-size 2",
    "rates": "--lr-image 1e-4 --lr-text 3e-4 --layer-decay 0.7 --clip-grad-norm 1",
    "average": "--ema-decay 0.9 --skip-nonfinite 1",
    "schedule": "--schedule constant-cooldown --cooldown-epochs 1 --warmup-steps 3",
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_in_mid_epoch_resumes_to_the_same_bits(tiny, tmp_path, case, monkeypatch):
    flags, options = CASES[case].split(), {"val": "none", "epochs": 2}
    whole = train(tiny, tmp_path / "whole", *flags, **options)
    save, saves = CheckpointManager.save, []

    def save_and_stop(self, *args, **options):
        save(self, *args, **options)
        saves.append(self.state.step)
        if self.state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointManager, "save", save_and_stop)
    monkeypatch.setattr(CheckpointManager, "should_save", lambda self: self.state.step == 1)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path / "parts", *flags, **options)
    monkeypatch.undo()
    parts = train(tiny, tmp_path / "parts", *flags, **options)
    assert saves[-1] == 2 and step_losses(parts) == step_losses(whole)
    for key in ("state_dict", "optimizer", "ema", "locked"):
        assert_equal(weights(parts).get(key), weights(whole).get(key))
