"""The scripts on weights that are no checkpoint of ours: evaluations, classifiers, --init-from."""

import json
import os
import re

import pytest
import timm
import torch
from helpers import train_flags
from test_pretrained import assert_same_model, save, small, small_clip, theirs  # noqa: F401

import eval_retrieval
import eval_zeroshot
import main
import main_finetune
import main_linear
import models
from preprocessing import IMAGENET_MEAN
from pretrained import create_model_and_transforms, load_model, open_weights
from towers import check_size
from utils import InputError


def run(script, text):
    script.main(script.get_args_parser().parse_args(text.split()))


def test_the_scripts_take_foreign_weights(probed, tiny, tmp_path, capsys):
    """The pixels that they see are checked in test_preprocessing.py."""
    path = save(tmp_path / "x.pt", theirs(small()))
    common = f"--catalog {probed}/catalog.json --workers 0 --device cpu --output-dir {tmp_path}"
    run(eval_zeroshot, f"--resume SMALL:{path} {common} --datasets digits")
    captions = f"--captions {tiny}/captions.json --root {tiny}/train2017"
    common_too = f"--workers 0 --device cpu --output-dir {tmp_path}"
    run(eval_retrieval, f"--resume SMALL:{path} {captions} --image-size 48 {common_too}")
    for classifier in ("knn", "linear"):
        flags = f"{common} --dataset digits --epochs 1 --batch-size 8 --classifier {classifier}"
        run(main_linear, f"--pretrained SMALL:{path} {flags}")
    flags = f"{common} --dataset digits --epochs 1 --batch-size 8 --preset small --warmup-epochs 0"
    run(main_finetune, f"--pretrained SMALL:{path} {flags}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["digits"]["model"] == "CLIP_SMALL"
    assert {"linear.json", "knn-20.json", "finetune.json", "retrieval.json"} <= set(
        os.listdir(tmp_path)
    )


def test_a_checkpoint_of_open_clips_trainer_opens(tmp_path, capsys):
    """With all that its epoch_K.pt holds: DDP's prefix, optimizer and scaler."""
    model = small("CLIP_SMALL-quickgelu")
    weights = {f"module.{key}": value for key, value in theirs(model).items()}
    parameters = [torch.nn.Parameter(value.clone()) for value in weights.values()]
    optimizer = torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}])
    torch.stack([value.float().sum() for value in parameters]).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    state = {"epoch": 3, "name": "2026_11_25-model_SMALL-lr_0.001", "state_dict": weights}
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler}
    path = save(tmp_path / "epoch_3.pt", state)
    assert_same_model(load_model(f"SMALL-quickgelu:{path}")[0], model)
    assert not capsys.readouterr().err


def test_a_tag_of_timms_chooses_the_form(tmp_path, capsys):
    """The usual weights of that tower want other images than DINO's."""
    vit = timm.create_model("vit_small_patch16_224", num_classes=0)
    path = save(tmp_path / "x.pth", vit.state_dict())
    for tag, mean in (("", (0.5, 0.5, 0.5)), (".dino", IMAGENET_MEAN)):
        found = open_weights(path, f"vit_small_patch16_224{tag}")
        assert found.tower.preprocessing.mean == mean
        said = capsys.readouterr().err
        assert f"images take mean {mean} and bicubic resizing of timm's vit_small_patch16_" in said


def test_features_of_one_file_under_two_names_are_kept_apart(tmp_path):
    path = save(tmp_path / "x.pt", theirs(small()))
    names = [f"SMALL:{path}", f"SMALL-quickgelu:{path}"]
    assert len({open_weights(name).digest() for name in names}) == 2


def test_image_towers_alone_serve_with_their_architecture(probed, tmp_path, capsys):
    vit = timm.create_model("test_vit", num_classes=0)
    state = {f"teacher.backbone.{k}": v for k, v in vit.state_dict().items()}
    state["teacher.head.mlp.0.weight"] = torch.zeros(3, 3)
    path = save(tmp_path / "dino.pth", {"teacher": state, "epoch": 1})
    common = f"--pretrained {path} --arch test_vit --catalog {probed}/catalog.json --workers 0 "
    common += f"--device cpu --output-dir {tmp_path} --dataset digits --batch-size 8 --epochs 1"
    run(main_linear, common)
    run(main_finetune, f"{common} --preset small --warmup-epochs 0")
    found = open_weights(path, "test_vit").build()
    config = vit.pretrained_cfg
    assert found.preprocessing.mean == config["mean"] and found.image_size == 160
    assert found.preprocessing.interpolation == config["interpolation"]
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(found.encode_image(x), vit.eval()(x))
    assert "is read from teacher.backbone.*" in capsys.readouterr().err
    trained = {"state_dict": vit.state_dict(), "args": {"model": "test_vit"}, "epoch": 3}
    trained = open_weights(save(tmp_path / "timm.pth.tar", trained), "test_vit").build()  # timm's
    with torch.no_grad():
        assert torch.equal(trained.encode_image(x), vit(x))
    for arch, match in (
        (None, "holds no model of CLIP's kind .*name its architecture"),
        ("test_resnet", "of another image tower .*missing"),
        ("nonesuch", "unknown tower 'nonesuch'"),
    ):
        with pytest.raises(InputError, match=match):
            open_weights(path, arch)


def test_a_tower_whose_patch_is_a_number(tmp_path):
    xcit = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    found = open_weights(save(tmp_path / "x.pt", xcit.state_dict()), "xcit_nano_12_p16_224")
    assert found.build().image_size == 224


def test_a_run_starts_from_weights(tiny, tmp_path, capsys):
    model = small()
    path = save(tmp_path / "x.pt", theirs(model))
    flags = train_flags(tiny, tmp_path / "run", "--init-from", path, "--lr", 1e-12, "--lr-start", 0)
    flags += ["--model", "SLIP_SMALL", "--lr-end", "0", "--wd", "0", "--val-dataset", "none"]
    main.main(main.get_args_parser().parse_args(flags))
    said = capsys.readouterr().out
    assert f"initialised from {path}; from: image tower, text tower and projections" in said
    assert "new: SimCLR head" in said
    found, args = load_model(tmp_path / "run/checkpoint.pt")
    assert args.model == "SLIP_SMALL" and found.preprocessing == model.preprocessing
    for key, value in model.state_dict().items():
        assert torch.allclose(found.state_dict()[key], value, atol=1e-6), key
    path.rename(tmp_path / "elsewhere")  # a run that resumes does without
    main.main(main.get_args_parser().parse_args([*flags, "--epochs", "2"]))
    assert load_model(tmp_path / "run/checkpoint.pt")[0].preprocessing == model.preprocessing
    with pytest.raises(InputError, match="trained with --init-from '.*x.pt', not ''; give the sam"):
        at = flags.index("--init-from")
        main.main(main.get_args_parser().parse_args(flags[:at] + flags[at + 2 :]))


@pytest.mark.parametrize(
    "source, target, note",
    [
        ("CLIP_SMALL", "SIMCLR_SMALL", "from: image tower; new: SimCLR head; left out: text"),
        ("SLIP_SMALL", "CLIP_SMALL", "from: image tower, text tower and .*; left out: SimCLR head"),
        ("SIMCLR_SMALL", "CLIP_SMALL", "from: image tower; new: text tower"),
    ],
)
def test_parts_that_both_have_are_taken(source, target, note, tmp_path):
    old, new = small(source), small(target, seed=1)
    path = save(tmp_path / "x.pt", old.state_dict())
    found = open_weights(f"{source}:{path}" if source != "SIMCLR_SMALL" else path, "SMALL")
    assert re.search(note, found.initialise(new))
    assert torch.equal(new.visual.norm.bias, old.visual.norm.bias)


def test_weights_of_another_tower_do_not_start_a_run(tmp_path):
    path = save(tmp_path / "x.pt", theirs(small()))
    with pytest.raises(InputError, match="it holds SMALL, not VITTINY8; choose the former"):
        open_weights(f"SMALL:{path}", "VITTINY8")
    with pytest.raises(InputError, match=r"do not fit \(.*missing: visual.*\); choose their model"):
        open_weights(path, "SMALL").initialise(models.create_model("CLIP_NANO8"))


def test_sizes_that_a_tower_cannot_take_are_one_line():
    with torch.device("meta"):
        resnet = timm.create_model("resnet50_clip", num_classes=0)
    for size in (16, 230):
        with pytest.raises(InputError, match=f"size {size} is no multiple of the patch of 32"):
            check_size(resnet, size)
    check_size(resnet, 288)
    with pytest.raises(InputError, match="image size 33 is no multiple of the patch of 8 pixels"):
        create_model_and_transforms("SMALL", image_size=33)
