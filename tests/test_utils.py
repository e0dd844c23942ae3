"""Schedule, parameter groups, meters, flags, errors and the files of a run."""

import numpy as np
import pytest
import torch

import utils
from infra import distributed
from infra.run import Meters
from models import create_model
from utils import InputError, cosine_scheduler


def test_schedule_equals_the_archived_code(reference):
    args = reference["schedule"]["args"]
    assert np.allclose(cosine_scheduler(**args), reference["schedule"]["values"], rtol=1e-12)


def test_schedule_may_be_all_or_no_warmup():
    assert len(cosine_scheduler(1.0, 0.1, 2, 5, 2, 0.0)) == 10
    assert cosine_scheduler(1.0, 0.1, 2, 5)[0] == 1.0
    with pytest.raises(InputError, match="--warmup-epochs 3 exceeds --epochs 2"):
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


def test_meters_average_windows_and_the_epoch():
    meters = Meters()
    for value in (1.0, 2.0):
        meters.update({"loss": torch.tensor(value)})
    assert meters.read() == {"loss": [1.0, 2.0]}
    assert meters.means() == {"loss": 1.5}
    meters.update({"loss": torch.tensor(6.0)})
    assert meters.read() == {"loss": [6.0]}
    assert meters.means() == {"loss": 6.0}
    assert meters.averages() == {"loss": 3.0}
    assert meters.read() == {"loss": []} and meters.means() == {}


def test_meters_do_not_depend_on_when_they_are_read():
    """Bit for bit, though sums of floats depend on their order; also through a checkpoint."""
    values = torch.rand(50).tolist()

    def means(reads):
        meters = Meters()
        for i, value in enumerate(values):
            meters.update({"loss": torch.tensor(value)})
            if i in reads:
                meters.read()
                state, meters = meters.state_dict(), Meters()
                meters.load_state_dict(state)
        meters.read()
        return meters.means(), meters.averages()

    assert means([]) == means([3, 4, 30]) == means(range(50))


def test_meters_average_over_ranks(two_ranks):
    assert two_ranks["one"]["meters"] == {"loss": 1.5}
    assert two_ranks["rank0"]["meters"] == two_ranks["rank1"]["meters"] == {"loss": 2.0}


def test_an_input_error_is_one_line_and_exit_code_2(capsys):
    def fail():
        raise InputError("Caught InputError in worker.\nTraceback\nutils.InputError: image x.jpg")

    with pytest.raises(SystemExit) as stop:
        distributed.run_script(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image x.jpg\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        distributed.run_script(lambda: 1 / 0)


@pytest.mark.parametrize("flags", [["--epoch", "3"], ["--count", "0"], ["--count", "x"], ["x"]])
def test_wrong_flags_are_input_errors(flags):
    parser = utils.ArgumentParser("script.py", "A script")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--count", type=utils.positive_int)
    with pytest.raises(InputError, match="script.py --help"):
        parser.parse_args(flags)


def test_cuda_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cpu"):
        distributed.init_distributed("cuda")


def test_atomic_writing_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomically(path, fail)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "environment, match",
    [
        ({"RANK": "x"}, "RANK='x' in the environment is no number; unset it"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is none of WORLD_SIZE=2 ranks"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is none of WORLD_SIZE=0 ranks"),
        ({"WORLD_SIZE": "9" * 400}, "is no number"),
        (
            {"WORLD_SIZE": "2", "MASTER_PORT": "x", "MASTER_ADDR": "::1"},
            "cannot meet by --dist-url env://: .*'x'; ",
        ),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR expected, but not set; correct it"),
    ],
)
def test_garbage_from_a_launcher_is_told(monkeypatch, environment, match):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        distributed.init_distributed("cpu")


def test_a_local_rank_that_is_none(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(InputError, match="LOCAL_RANK='first' in the environment is no number"):
        distributed.rank_zero_first(lambda: 1)


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
