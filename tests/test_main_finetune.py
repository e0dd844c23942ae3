"""Fine-tuning end to end: layer decay, presets, positions, augmentation, resume, ranks, errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import save_image
from launch import run_script
from PIL import Image
from test_main_linear import flags as probe_flags
from test_main_linear import result

import main_finetune
import main_linear
import models
import optimization
import towers
from infra import devices
from preprocessing import Preprocessing
from pretrained import open_weights
from utils import InputError

FP32 = devices.Precision("fp32", torch.device("cpu"))
FORM = Preprocessing(image_size=32)


def parse(argv):
    return main_finetune.get_args_parser().parse_args(argv)


def flags(probed, out, *extra):
    given = probe_flags(probed, out, "--preset", "small", "--warmup-epochs", 0, "--lr", 1e-3)
    return [*given, *map(str, extra)]


def call(probed, out, *extra):
    main_finetune.main(parse(flags(probed, out, *extra)))


def weights(out):
    return torch.load(out / "finetune-digits/checkpoint.pt", weights_only=True)


def test_presets_set_what_is_not_given():
    small, large = (
        parse(["--pretrained", "x", "--preset", "small"]),
        parse(["--pretrained", "x", "--preset", "large", "--epochs", "3"]),
    )
    assert (small.epochs, small.warmup_epochs, small.layer_decay, small.drop_path) == (
        100, 20, 0.65, 0.0,
    )  # fmt: skip
    assert (large.epochs, large.warmup_epochs, large.layer_decay, large.drop_path) == (
        3, 5, 0.75, 0.1,
    )  # fmt: skip
    base = parse(["--pretrained", "x"])
    recipe = {"lr": 4e-3, "weight_decay": 0.05, "batch_size": 128, "min_lr": 1e-6, "mixup": 0.8}
    recipe |= {"cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25, "color_jitter": 0.4}
    recipe |= {"warmup_lr": 1e-6, "drop_path": 0.1, "aa": "rand-m9-mstd0.5-inc1"}
    assert {key: vars(base)[key] for key in recipe} == recipe


def test_rates_fall_from_the_head_down():
    vit = towers.create_visual(towers.TOWERS["VITTINY8"])
    vit.reset_classifier(10)
    groups = optimization.layer_groups(vit, 0.05, 0.5)
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(vit.named_parameters())
    assert len(scales) == len(named)
    expected = {"head.weight": 1, "norm.weight": 1, "blocks.3.mlp.fc1.weight": 0.5}
    expected |= {"blocks.0.norm1.bias": 0.5**4, "cls_token": 0.5**5, "pos_embed": 0.5**5}
    expected |= {"patch_embed.proj.weight": 0.5**5}
    assert {name: scales[id(named[name])] for name in expected} == expected
    plain = {n for n, p in named.items() if decays[id(p)] == 0}
    assert {"cls_token", "pos_embed", "head.bias", "norm.weight"} <= plain
    assert "head.weight" not in plain and "patch_embed.proj.weight" not in plain


def test_positions_are_interpolated_and_the_head_is_small(probed):
    path = probed / "run/checkpoint.pt"
    same, _ = open_weights(path).build_vit(10)
    larger, _ = open_weights(path).build_vit(10, image_size=64)
    assert same.pos_embed.shape == (1, 17, 64) and larger.pos_embed.shape == (1, 65, 64)
    assert torch.equal(larger.pos_embed[:, 0], same.pos_embed[:, 0])  # the class token's
    coarse = larger.pos_embed[:, 1:].view(8, 8, 64).permute(2, 0, 1)[None]
    coarse = torch.nn.functional.avg_pool2d(coarse, 2)[0].permute(1, 2, 0).reshape(16, 64)
    assert torch.cosine_similarity(coarse, same.pos_embed[0, 1:]).min() > 0.9
    assert same.head.weight.abs().max() < 1e-4 and same.head.weight.std() > 1e-6
    with torch.no_grad():
        assert larger(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_positions_are_resampled_as_by_beits_script(probed):
    path = probed / "run/checkpoint.pt"
    same, _ = open_weights(path).build_vit(10)
    for size, side in ((64, 8), (48, 6), (16, 2)):
        found, _ = open_weights(path).build_vit(10, image_size=size)
        grid = same.pos_embed[:, 1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
        assert torch.allclose(found.pos_embed[0, 1:], grid[0].flatten(1).T, atol=1e-6)


@pytest.mark.parametrize(
    "size, crop_pct, side",
    [
        (224, None, 256),  # the paper's
        (240, None, 274),  # BeiT's script cuts the fraction off
        (384, None, 384),
        (512, None, 512),
        (384, 0.875, 438),
        (224, 1.0, 224),
    ],
)
def test_test_images_are_cut_as_by_beits_script(size, crop_pct, side):
    assert main_finetune.resized_side(size, crop_pct) == side


def test_the_crop_of_test_images_is_a_flag(probed, tmp_path, monkeypatch):
    seen = []
    keep = main_finetune.CenterCrop

    def watched(*args):
        seen.append(args)
        return keep(*args)

    monkeypatch.setattr(main_finetune, "CenterCrop", watched)
    call(probed, tmp_path, "--epochs", 1)
    call(probed, tmp_path, "--epochs", 1, "--evaluate", "--crop-pct", 1)
    assert seen == [(32, 36, "bicubic"), (32, 32, "bicubic")]
    with pytest.raises(InputError, match="1.5 must be 0.01 or more and below"):
        call(probed, tmp_path, "--crop-pct", 1.5)


def test_warm_up_starts_where_the_flag_says(probed):
    """1e-6, the recipe's; BeiT's script parses that flag and starts from 0."""
    for flag, first in (((), 1e-6), (("--warmup-lr", "0"), 0.0)):
        args = parse(["--pretrained", "x", "--epochs", "3", "--warmup-epochs", "1", *flag])
        vit, tower = open_weights(probed / "run/checkpoint.pt").build_vit(10)
        model = main_finetune.Classifier(vit, tower)
        training = main_finetune.create_training(model, FP32, 5, args)
        assert training.schedule[0] == first and training.schedule[4] == args.lr


def test_a_view_depends_on_its_generator_alone(tmp_path):
    save_image(tmp_path / "x.png", 0, (80, 60))
    image = Image.open(tmp_path / "x.png").convert("RGB")
    args = parse(["--pretrained", "x", "--reprob", "0.5"])
    view = main_finetune.TimmView(FORM, args)

    def draw(seed):
        return view(image, np.random.default_rng(seed))

    torch.manual_seed(0)
    first, state = draw(1), torch.get_rng_state()
    torch.rand(3)
    np.random.rand(3)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the program's own numbers go on
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    plain = parse(["--pretrained", "x", "--aa", "none", "--reprob", "0", "--color-jitter", "0"])
    shown = main_finetune.TimmView(FORM, plain)(image, np.random.default_rng(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (FORM.mean, FORM.std))
    pixels = shown * std + mean
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


def test_randaugment_at_its_strongest():
    """timm asks for 0 bits of colour at magnitude 10."""
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    args = parse(["--pretrained", "x", "--aa", "rand-m10-mstd0.5-inc1", "--reprob", "0"])
    view = main_finetune.TimmView(replace(FORM, image_size=8), args)
    for seed in range(300):
        assert view(image, np.random.default_rng(seed)).isfinite().all()
    (step,) = [step for step in view.transform.transforms if hasattr(step, "ops")]
    (found,) = [op for op in step.ops if op.name == "PosterizeIncreasing"]
    assert found.aug_fn(image, 0).getpixel((0, 0)) == (128, 0, 0)


def test_training_resuming_and_the_average_of_weights(probed, tmp_path, capsys):
    call(probed, tmp_path / "whole", "--model-ema", "--model-ema-decay", 0.5)
    said = capsys.readouterr().out
    assert "--preset small: --epochs 2 --warmup-epochs 0 --layer-decay 0.65 --drop-path 0.0" in said
    assert result(tmp_path / "whole", "finetune")["images"] == 30
    assert result(tmp_path / "whole", "finetune-ema")["images"] == 30
    whole = weights(tmp_path / "whole")
    assert not torch.equal(whole["ema"]["head.weight"], whole["state_dict"]["head.weight"])

    extra = ["--model-ema", "--model-ema-decay", 0.5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_finetune.engine, "train_one_epoch", stop_after(1))
        with pytest.raises(KeyboardInterrupt):
            call(probed, tmp_path / "parts", *extra)
    call(probed, tmp_path / "parts", *extra)
    parts = weights(tmp_path / "parts")
    for kind in ("state_dict", "ema"):
        for key, value in whole[kind].items():
            assert torch.equal(parts[kind][key], value), key
    before = result(tmp_path / "parts", "finetune")
    call(probed, tmp_path / "parts", "--evaluate", *extra)
    assert result(tmp_path / "parts", "finetune") == before


def stop_after(epochs):
    """train_one_epoch that many times, then an interruption."""
    keep, calls = main_finetune.engine.train_one_epoch, []

    def train(*args, **options):
        if len(calls) == epochs:
            raise KeyboardInterrupt
        calls.append(1)
        return keep(*args, **options)

    return train


def test_an_average_that_never_was(probed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(main_finetune.engine, "train_one_epoch", stop_after(1))
        with pytest.raises(KeyboardInterrupt):
            call(probed, tmp_path)
    first = weights(tmp_path)["state_dict"]
    with pytest.raises(InputError, match="--model-ema: .*holds no average; omit the flag"):
        call(probed, tmp_path, "--model-ema", "--evaluate")
    call(probed, tmp_path, "--model-ema", "--model-ema-decay", 0.999999)
    assert "holds no average of weights: it starts from its weights" in capsys.readouterr().out
    for key, value in weights(tmp_path)["ema"].items():
        assert torch.allclose(value, first[key], atol=1e-4), key
    call(probed, tmp_path, "--model-ema", "--evaluate")


def test_flags_that_would_not_be_applied_are_refused(probed, tmp_path):
    call(probed, tmp_path)
    for extra, match in (
        (
            ["--lr", 50],
            "trained with --lr 0.001, not 50.0; give the same, or another output",
        ),
        (["--epochs", 3], "trained with --epochs 2, not 3"),
        (["--update-freq", 2], "trained with effective_batch 8, not 16"),
    ):
        with pytest.raises(InputError, match=match):
            call(probed, tmp_path, *extra)
    call(probed, tmp_path, "--evaluate", "--epochs", 90)
    assert result(tmp_path, "finetune")["epochs"] == 2


def test_another_checkpoint_does_not_go_on_with_a_run(probed, tmp_path):
    call(probed, tmp_path / "out", "--epochs", 1)
    state = torch.load(probed / "run/checkpoint.pt", weights_only=True)
    torch.save({**state, "epoch": 9}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="began from another pretrained checkpoint; choose"):
        call(probed, tmp_path / "out", "--pretrained", tmp_path / "other.pt")


def test_two_ranks_train_what_one_does(probed, tmp_path):
    """Without Mixup, whose numbers are each rank's own."""
    extra = ["--mixup", 0, "--cutmix", 0, "--epochs", 1, "--update-freq", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    call(probed, one, *extra)
    run = run_script("main_finetune.py", flags(probed, two, *extra, "--batch-size", 4), ranks=2)
    assert run.returncode == 0, run.stderr
    for key, value in weights(one)["state_dict"].items():
        assert torch.allclose(weights(two)["state_dict"][key], value, atol=1e-5), key
    found = result(two, "finetune")
    assert found["accuracy"] == result(one, "finetune")["accuracy"]
    call(probed, two, "--evaluate", *extra)
    assert result(two, "finetune") == found


@pytest.mark.parametrize(
    "extra, match",
    [
        (["--batch-size", 7], "--batch-size 7: Mixup takes pairs; make it even"),
        (
            ["--update-freq", 9],
            "9 micro-batches per update are more than the 5 batches of an epoch",
        ),
        (["--evaluate"], "--evaluate: .*checkpoint.pt is absent"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--aa", "foo"], "--aa 'foo' is no augmentation of timm's, as rand-m9-mstd0.5-inc1"),
        (["--aa", "rand-m9-foo1"], "--aa 'rand-m9-foo1' is no augmentation"),
        (["--input-size", 5], "image size 5 is no multiple of the patch of 8 pixels"),
        (["--input-size", 33], "image size 33 is no multiple of the patch of 8 pixels"),
        (["--warmup-epochs", 3], "warm-up of 3 epochs exceeds training of 2"),
    ],
)
def test_bad_input(probed, tmp_path, extra, match):
    with pytest.raises(InputError, match=match):
        call(probed, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["visual.", "visual.pos_embed"])
def test_a_checkpoint_without_its_tower(probed, tmp_path, prefix):
    state = torch.load(probed / "run/checkpoint.pt", weights_only=True)
    kept = {k: v for k, v in state["state_dict"].items() if not k.startswith(prefix)}
    torch.save({**state, "state_dict": kept}, tmp_path / "c.pt")
    with pytest.raises(InputError, match="keys missing: .*pos_embed.*; check the checkpoint"):
        call(probed, tmp_path / "out", "--pretrained", tmp_path / "c.pt")


@pytest.mark.parametrize(
    "labels, match",
    [
        ('{"digits": 5}', "labels of 'digits' are 5, not a list"),
        ("[1]", "labels .* is no JSON object"),
        ('{"digits": [[]]}', "labels of 'digits': .* is neither a text nor a list of texts"),
    ],
)
@pytest.mark.parametrize("script", [main_finetune, main_linear])
def test_labels_of_another_kind(script, probed, tmp_path, labels, match):
    (tmp_path / "labels.json").write_text(labels)
    given = probe_flags(probed, tmp_path / "out", "--labels", tmp_path / "labels.json")
    with pytest.raises(InputError, match=match):
        script.main(script.get_args_parser().parse_args(given))


def test_a_tower_that_is_no_vit(tmp_path):
    model = models.create_model("SIMCLR_test_resnet", 8, 8)
    state = {"state_dict": model.state_dict(), "args": {"model": "SIMCLR_test_resnet"}}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(InputError, match="SIMCLR_test_resnet, whose image tower is no ViT"):
        open_weights(tmp_path / "c.pt").build_vit(10)
