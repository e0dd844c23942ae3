"""Old results and the folder of new ones are looked at before the scoring, in every script."""

import errno
import json
import os

import pytest
from test_classes import run_finetune, run_probe, run_zeroshot

import eval_retrieval
import evaluation
import features
from utils import InputError


def run_retrieval(tiny, probed, catalog, out, *extra):
    given = f"--resume {probed}/run/checkpoint.pt --captions {tiny}/captions.json --device cpu "
    given += f"--root {tiny}/train2017 --output-dir {out} --workers 0"
    eval_retrieval.main(eval_retrieval.get_args_parser().parse_args([*given.split(), *extra]))


RUNS = [
    (run_zeroshot, "results", []),
    (run_zeroshot, "examples", []),
    (run_probe, "linear", ["--classifier", "linear"]),
    (run_probe, "logistic", ["--classifier", "logistic"]),
    (run_probe, "knn-1", []),
    (run_finetune, "finetune", []),
    (run_finetune, "finetune-ema", ["--model-ema"]),
    (run_retrieval, "retrieval", []),
]


@pytest.fixture
def no_scoring(monkeypatch):
    def fail(*args):
        raise AssertionError("an image was scored")

    monkeypatch.setattr(evaluation, "sharded_batches", fail)
    monkeypatch.setattr(features, "sharded_batches", fail)


@pytest.mark.parametrize("run, name, extra", RUNS)
def test_before_the_scoring(run, name, extra, tiny, probed, tmp_path, no_scoring):
    def call(out, match):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=match):
            run(tiny, probed, probed / "catalog.json", out, *extra)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "file").write_text("")
    call(tmp_path / "file/out", "folder .*file/out: Not a directory; choose another")
    call("/proc/out/x", "folder /proc/out/x: No such file or directory; choose another")

    old, remedy = tmp_path / f"{name}.json", "; correct or remove it, or choose another folder"
    for text, match in (
        ("{", f"results .*{name}.json is not valid JSON.*"),
        ("[1]", f"results .*{name}.json is no JSON object.*"),
    ):
        old.write_text(text)
        call(tmp_path, match + remedy)
    old.unlink()
    old.mkdir()
    call(tmp_path, f"results .*{name}.json: it is no regular file.*{remedy}")


def test_a_full_disk_is_noticed(monkeypatch, tmp_path):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = {"digits": {"accuracy": 1}}
    (tmp_path / "x.json").write_text(json.dumps(kept))
    evaluation.check_results(tmp_path / "new/folder", "x")
    evaluation.check_results(tmp_path, "x", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]

    files = {str(tmp_path / f"{n}.npy"): ("float32", (n, 1000)) for n in (1000, 2000)}
    features.reserve(files)
    for file in files:
        assert os.stat(file).st_blocks * 512 >= os.stat(file).st_size > 4_000_000
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        InputError, match="No space left on device; the features need 12.0 MB there"
    ):
        features.reserve(files)
    assert not any(map(os.path.exists, files))
