"""Pre-training end to end on small files: every method, resume, several ranks, bad input."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import (
    assert_equal,
    rows,
    step_losses,
    train,
    train_flags,
    train_in_two_lives,
    weights,
    write_coco,
)
from launch import run_command, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import save_released

import advice
import main
import warmup
from infra.logger import Logger
from utils import InputError


def test_the_archived_flags_and_defaults_stand():
    args = vars(main.get_args_parser().parse_args([]))
    archived = {
        "dataset": "yfcc15m",
        "root": "",
        "metadata": "yfcc15m.pkl",
        "output_dir": "./",
        "model": "SLIP_VITB16",
        "ssl_mlp_dim": 4096,
        "ssl_emb_dim": 256,
        "ssl_scale": 1.0,
        "ssl_temp": 0.1,
        "resume": "",
        "epochs": 25,
        "warmup_epochs": 1,
        "batch_size": 64,
        "lr": 3e-3,
        "lr_start": 1e-6,
        "lr_end": 1e-5,
        "update_freq": 1,
        "wd": 0.1,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "eval_freq": 1,
        "disable_amp": False,
        "print_freq": 10,
        "workers": 10,
        "evaluate": False,
        "dist_url": "env://",
        "seed": 0,
    }
    assert {key: args[key] for key in archived} == archived


@pytest.mark.parametrize("method", ["CLIP", "SIMCLR", "SLIP"])
def test_every_method_trains(tiny, tmp_path, method, capsys):
    train(tiny, tmp_path, model=f"{method}_NANO8", epochs=2)
    log = rows(tmp_path)
    assert [row["epoch"] for row in log] == [0, 1]
    metrics = {"CLIP": ["clip"], "SIMCLR": ["ssl"], "SLIP": ["clip", "ssl"]}[method]
    for name in metrics:
        assert f"train_{name}_loss" in log[0] and f"train_{name}_acc" in log[0]
    assert {"train_loss", "lr", "samples_per_sec", "pairs", "data_wait"} <= log[0].keys()
    assert log[0]["pairs"] == 16
    has_text = method != "SIMCLR"
    assert ("logit_scale" in log[0]) == ("test_acc1" in log[0]) == has_text
    files = set(os.listdir(tmp_path))
    assert {"checkpoint.pt", "log.txt", "args.json"} <= files
    assert ("checkpoint_best.pt" in files) == has_text
    settings = json.loads((tmp_path / "args.json").read_text())
    assert settings["effective_batch"] == 4 and settings["args"]["lr"] == 1e-3
    assert settings["precision"] == "fp32"
    printed = capsys.readouterr().out
    assert "epoch 1 [4/4]" in printed and "samples/s" in printed and "left 00:00" in printed
    assert ("no zero-shot validation" in printed) != has_text
    assert ("batch statistics" in printed) == (method != "CLIP")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["views"]
    assert len(events.Scalars("train/loss")) == 8


def test_one_epoch_and_one_more_equal_two_bit_for_bit(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole", epochs=2)
    again = ["--resume", "absent.pt"]  # own comes first
    parts = train_in_two_lives(tiny, tmp_path / "parts", again=again, epochs=2)

    assert step_losses(parts) == step_losses(whole)
    for key in ("epoch", "state_dict", "optimizer", "best_acc1"):
        assert_equal(weights(parts)[key], weights(whole)[key])
    assert [row["train_loss"] for row in rows(parts)] == [row["train_loss"] for row in rows(whole)]


def test_a_finished_run_and_a_longer_one_go_on(tiny, tmp_path):
    train(tiny, tmp_path, epochs=1)
    before = rows(tmp_path)
    train(tiny, tmp_path, epochs=1)
    assert rows(tmp_path) == before
    train(tiny, tmp_path, epochs=2)
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]


def test_accumulation_and_a_loader_that_is_no_multiple_of_it(tiny, tmp_path):
    train(tiny, tmp_path, "--update-freq", 3, epochs=2, val="none")  # 4 batches an epoch
    assert [row["pairs"] for row in rows(tmp_path)] == [12, 12]
    assert len(step_losses(tmp_path)) == 2
    assert json.loads((tmp_path / "args.json").read_text())["effective_batch"] == 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_the_cpu(tiny, tmp_path, precision):
    train(tiny, tmp_path, "--precision", precision, model="CLIP_NANO8")
    plain = train(tiny, tmp_path / "plain", "--disable-amp", model="CLIP_NANO8")
    assert step_losses(tmp_path)[0] == pytest.approx(step_losses(plain)[0], rel=0.02)
    assert step_losses(tmp_path) != step_losses(plain)
    assert bool(weights(tmp_path)["scaler"]) == (precision == "fp16")


def test_workers_do_not_change_a_run(tiny, tmp_path):
    losses = [
        step_losses(train(tiny, tmp_path / str(n), "--workers", n, val="none")) for n in (0, 2)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("model", ["SLIP_NANO8", "CLIP_NANO8"])
def test_two_ranks_equal_one_process(tiny, tmp_path, model):
    one = train(tiny, tmp_path / "one", "--gather-with-grad", "--batch-size", 8, model=model)
    flags = train_flags(tiny, tmp_path / "two", "--gather-with-grad", model=model)
    run = run_script("main.py", flags, ranks=2)
    assert run.returncode == 0 and "FutureWarning" not in run.stderr, run.stderr
    assert step_losses(tmp_path / "two") == pytest.approx(step_losses(one), rel=1e-5, abs=1e-5)
    expected, got = rows(one)[0], rows(tmp_path / "two")[0]
    assert got["test_acc1"] == pytest.approx(expected["test_acc1"], abs=3.4)  # one image of 30
    assert run.stdout.count("epoch 0 [2/2]") == 1
    settings = json.loads((tmp_path / "two/args.json").read_text())
    assert settings["world_size"] == 2 and settings["effective_batch"] == 8


def test_evaluate(tiny, tmp_path, capsys):
    train(tiny, tmp_path, model="CLIP_NANO8")
    accuracy = rows(tmp_path)[0]["test_acc1"]
    capsys.readouterr()
    train(tiny, tmp_path, "--evaluate", model="CLIP_NANO8")
    assert f"digits: top1 {accuracy:.2f}, 30 images of test" in capsys.readouterr().out
    assert len(rows(tmp_path)) == 1


def test_a_progress_bar_on_a_terminal(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(tiny, tmp_path, val="none")
    captured = capsys.readouterr()
    assert "4/4" in captured.err and "samples/s" in captured.err and "data wait" in captured.err
    assert "epoch 0 [" not in captured.out


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--model", "SLIP_VITX"], "unknown model 'SLIP_VITX'; choose"),
        (["--dataset", "laion"], "unknown dataset 'laion'; choose from yfcc15m"),
        (["--val-dataset", "food"], "unknown dataset 'food'; choose from digits"),
        (["--catalog", "none.json"], "catalog none.json: No such file"),
        (["--root", "nowhere"], "^root 'nowhere' is not a folder"),
        (["--root", "."], "image ./train2017/.*: No such file"),
        (["--metadata", "none.json"], "metadata none.json: No such file|none.json: No such file"),
        (["--resume", "none.pt"], "checkpoint 'none.pt' is absent; check the path"),
        (["--batch-size", "17"], "batch size 17 on 1 ranks is more than the 16 training"),
        (["--update-freq", "5"], "5 micro-batches per update are more than the 4 batches"),
        (["--workers", "-1"], "--workers: -1 must be 0 or more"),
        (["--lr", "nan"], "--lr: nan must be"),
        (["--betas", "0.9", "1"], "--betas: 1 must be 0 or more and below 1"),
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--output-dir", "/dev/null"], "folder /dev/null: File exists"),
        (["--warmup-epochs", "2"], "warm-up of 2 epochs exceeds training of 1"),
        (["--batch-size", "1"], "--batch-size 1 is too few for the SimCLR head"),
        (["--disable-amp", "--precision", "bf16"], "--disable-amp contradicts --precision bf16"),
        (
            ["--grad-checkpointing", "--model", "CLIP_dla34"],
            "no gradient checkpointing",
        ),
        (["--evaluate", "--val-dataset", "none"], "--evaluate has nothing to score"),
        (["--name", "x"], "--name x and --output-dir .*out: give one of them"),
        (["--evaluate"], "weights .*checkpoint.pt' is absent"),
    ],
)
def test_bad_input_leaves_nothing_behind(tiny, tmp_path, flags, match):
    with pytest.raises(InputError, match=match) as error:
        train(tiny, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_line_and_exits_with_2(tiny, tmp_path):
    flags = train_flags(tiny, tmp_path / "out", "--workers", 1, val="none")
    run = run_command("main.py", [*flags, "--model", "SLIP_VITX"])
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: unknown model") and run.stderr.count("\n") == 1

    metadata = write_coco(tmp_path / "broken", images=12)
    last = np.random.default_rng((0, 0)).permutation(12)[-1]  # a worker meets it
    (tmp_path / f"broken/train2017/{last:012d}.jpg").write_bytes(b"broken")
    flags += ["--root", tmp_path / "broken", "--metadata", metadata, "--model", "CLIP_NANO8"]
    run = run_script("main.py", flags)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith(
        "error: 1 of the epoch's 12 samples cannot be read, more than the allowed"
    )
    assert f"train2017/{last:012d}.jpg is empty, or no image" in error


def with_unreadable_images(root, output_dir, *extra):
    metadata = write_coco(root, images=16)
    for i in (3, 5):
        (root / f"train2017/{i:012d}.jpg").write_bytes(b"")
    flags = train_flags(root, output_dir, "--metadata", metadata, val="none", epochs=2)
    return [*flags, *map(str, extra)]


def test_unreadable_images_are_replaced_counted_and_named_once(tmp_path, capsys):
    flags = with_unreadable_images(tmp_path, tmp_path / "a", "--max-bad-fraction", 0.2)
    main.main(main.get_args_parser().parse_args(flags))
    assert [row["bad_samples"] for row in rows(tmp_path / "a")] == [2, 2]
    out = capsys.readouterr().out
    assert out.count("replaced by the next sample: image") == 2
    assert all(out.count(f"{i:012d}.jpg is empty") == 1 for i in (3, 5))
    flags += ["--max-bad-fraction", "0.1", "--output-dir", str(tmp_path / "b")]
    with pytest.raises(InputError, match="2 of the epoch's 16 samples cannot be read, more than"):
        main.main(main.get_args_parser().parse_args(flags))


def test_two_ranks_stop_together_at_too_many_unreadable_images(tmp_path):
    flags = with_unreadable_images(tmp_path, tmp_path / "a", "--batch-size", 2, "--workers", 1)
    run = run_script("main.py", flags, ranks=2)
    assert run.returncode != 0  # torchrun's own code
    assert "samples cannot be read, more than the allowed fraction of 0.01" in run.stderr
    assert run.stderr.count("error: ") == 1 and run.stderr.count("error (rank 1): ") == 1


def test_waiting_for_data_gives_one_line_of_advice_a_run(tiny, tmp_path, capsys):
    for augment, expected in (
        ("cpu", "--augment device, "),
        ("device", "--workers above 0, smaller"),
    ):
        args = main.get_args_parser().parse_args(train_flags(tiny, "out", "--augment", augment))
        model = main.models.create_model("CLIP_NANO8")
        loader = main.open_loader(model, torch.device("cpu"), args)
        log = Logger(tmp_path)
        advice.advise(log, 0.09, loader)
        assert not capsys.readouterr().out
        advice.advise(log, 0.37, loader)
        advice.advise(log, 0.38, loader)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and expected in said and "37%" in said


def test_a_checkpoint_of_another_model(tiny, tmp_path):
    train(tiny, tmp_path, model="CLIP_NANO8")
    with pytest.raises(InputError, match="of another model .*missing: image_mlp"):
        train(tiny, tmp_path, model="SLIP_NANO8")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_released_checkpoint_can_be_trained_on(tiny, tmp_path, precision):
    scaler = {"scale": 16.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler |= {"growth_interval": 2000, "_growth_tracker": 0}
    save_released(tmp_path / "c.pt", epoch=1, scaler=scaler)
    flags = ["--resume", tmp_path / "c.pt", "--precision", precision, "--wd", 0.3]
    train(tiny, tmp_path / "out", *flags, epochs=2, model="SLIP_NANO8")
    assert [row["epoch"] for row in rows(tmp_path / "out")] == [1]
    saved = weights(tmp_path / "out")["optimizer"]
    assert saved["param_groups"][0]["weight_decay"] == 0.3
    assert {int(state["step"]) for state in saved["state"].values()} == {5}  # 1 and 4


def test_convolutional_towers_train(tiny, tmp_path):
    extra = ["--lr", 1e-4, "--batch-size", 8]
    train(tiny, tmp_path, *extra, model="SLIP_NANORESNET", val="none")
    assert rows(tmp_path)[0]["train_loss"] > 0


def losses_of(tiny, folder, *flags, **options):
    train(tiny, folder, *flags, val="none", **options)
    return step_losses(folder)


@pytest.mark.parametrize("method", ["CLIP", "SIMCLR"])
def test_recomputing_activations_changes_no_loss(tiny, tmp_path, method):
    runs = [
        losses_of(tiny, tmp_path / name, *flags, model=f"{method}_NANO8", epochs=2)
        for name, flags in (("kept", []), ("recomputed", ["--grad-checkpointing"]))
    ]
    assert runs[0] == runs[1]


def test_compiled_towers_and_loss_train_alike(tiny, tmp_path, monkeypatch, capsys):
    """With captions of one length, as each costs a compilation."""
    monkeypatch.setattr(warmup, "LENGTHS", ())
    captions = json.loads((tiny / "captions.json").read_text())
    for annotation in captions["annotations"]:
        annotation["caption"] += " and on" * 40
    (tmp_path / "long.json").write_text(json.dumps(captions))
    options = {"model": "CLIP_NANO8"}
    runs = [
        losses_of(tiny, tmp_path / flag, flag, "--metadata", tmp_path / "long.json", **options)
        for flag in ("--no-compile", "--compile")
    ]
    assert "torch.compile failed" not in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2  # image, text, loss
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_a_machine_without_compiler_trains_uncompiled(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/bin/false",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    runs = [
        losses_of(tiny, tmp_path / flag, flag, model="CLIP_NANO8")
        for flag in ("--no-compile", "--compile")
    ]
    said = capsys.readouterr().out
    told = "warning: torch.compile failed, training continues without it on all ranks: rank 0: "
    assert told in said
    assert runs[1] == runs[0]


def test_exact_accumulation_says_what_it_does_not_cover(tiny, tmp_path, capsys):
    flags = ["--update-freq", 2, "--batch-size", 4, "--accum"]
    train(tiny, tmp_path, *flags, "exact", model="CLIP_NANORESNET", val="none")
    assert (
        "batch norm inside of CLIP_NANORESNET's image tower sees 4 samp" in capsys.readouterr().out
    )
    train(tiny, tmp_path / "plain", *flags, "plain", val="none")
    said = capsys.readouterr().out
    assert "micro-batches of 4; --accum exact takes them from all 8 samples of an update" in said


def test_ranks_validate_one_model_and_accumulate_as_one(tiny, tmp_path):
    """Two ranks with two micro-batches, and a tower whose batch norm counts on each rank."""
    flags = train_flags(tiny, tmp_path, "--update-freq", 2, model="CLIP_NANORESNET")
    run = run_script("main.py", flags, ranks=2)
    assert run.returncode == 0, run.stderr
    accuracy = rows(tmp_path)[0]["test_acc1"]
    assert rows(tmp_path)[0]["pairs"] == 16
    flags = [*flags, "--evaluate"]
    run = run_script("main.py", flags)
    assert f"top1 {accuracy:.2f}, 30 images" in run.stdout, run.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("flags", [["--no-compile"], ["--accum", "exact", "--update-freq", 2]])
def test_training_and_resuming_on_cuda(tiny, tmp_path, precision, flags):
    flags = ["--device", "cuda", "--precision", precision, *flags]
    train(tiny, tmp_path, *flags, epochs=1)
    train(tiny, tmp_path, *flags, epochs=2)
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]


@pytest.mark.cuda
def test_compiled_on_cuda_trains_alike(tiny, tmp_path):
    compiled, eager = (
        losses_of(tiny, tmp_path / flag, flag, "--device", "cuda", "--precision", "fp32")
        for flag in ("--compile", "--no-compile")
    )
    assert compiled == pytest.approx(eager, rel=1e-3)
