"""Schedule, parameter groups, meters, flags, errors and the files of a run."""

import fcntl
import multiprocessing
import os
import time

import numpy as np
import pytest

import utils
from models import create_model
from utils import InputError, cosine_scheduler

CONTEXT = multiprocessing.get_context("fork")


def test_schedule_equals_the_archived_code(reference):
    args = reference["schedule"]["args"]
    assert np.allclose(cosine_scheduler(**args), reference["schedule"]["values"], rtol=1e-12)


def test_schedule_may_be_all_or_no_warmup():
    assert len(cosine_scheduler(1.0, 0.1, 2, 5, 2, 0.0)) == 10
    assert cosine_scheduler(1.0, 0.1, 2, 5)[0] == 1.0
    with pytest.raises(InputError, match="warm-up of 3 epochs exceeds training of 2"):
        cosine_scheduler(1.0, 0.1, 2, 5, 3)


def test_weight_decay_spares_vectors_and_scalars():
    model = create_model("SLIP_VITTINY8", 32, 16)
    decayed, rest = utils.param_groups(model, 0.5)
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


@pytest.mark.parametrize("flags", [["--epoch", "3"], ["--count", "0"], ["--count", "x"], ["x"]])
def test_wrong_flags_are_input_errors(flags):
    parser = utils.ArgumentParser("script.py", "A script")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--count", type=utils.positive_int)
    with pytest.raises(InputError, match="script.py --help"):
        parser.parse_args(flags)


def test_atomic_writing_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_a_file_do_not_share_a_name(tmp_path):
    """As two containers do, whose process numbers are equal."""

    def write_around(file):
        file.write(b"first")
        utils.write_atomically(tmp_path / "file", lambda other: other.write(b"second, longer"))

    utils.write_atomically(tmp_path / "file", write_around)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_killed_writers_go_after_a_day(tmp_path):
    old, new, other = (tmp_path / f"f.{c * 16}.tmp" for c in "012")
    other = tmp_path / "f.of-mine.tmp"
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, time.time() - 25 * 3600))
    utils.write_json(tmp_path / "f", {})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "f", new, other])


def add_entries(path, own):
    for i in range(20):
        utils.update_json(path, {f"{own}-{i}": i})


def test_writers_at_once_keep_each_others_entries(tmp_path):
    path = tmp_path / "results.json"
    writers = [CONTEXT.Process(target=add_entries, args=(path, own)) for own in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    expected = {f"{own}-{i}": i for own in range(4) for i in range(20)}
    assert utils.read_json(path, "results") == expected
    assert os.listdir(tmp_path) == ["results.json"]


def test_without_locks_files_are_still_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with utils.locked(tmp_path / "x") as is_locked:
        assert not is_locked
    utils.update_json(tmp_path / "x", {"a": 1})
    assert utils.read_json(tmp_path / "x", "results") == {"a": 1}


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text, match",
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        (NESTED, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_read_json_names_the_file(tmp_path, text, match):
    path = tmp_path / "x.json"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=f"catalog .*x.json.*{match}"):
        utils.read_json(path, "catalog")
