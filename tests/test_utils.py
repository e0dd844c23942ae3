"""Schedule, parameter groups, meters, flags, errors and the files of a run."""

import numpy as np
import pytest

import utils
from models import create_model
from utils import InputError, cosine_scheduler


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
    assert path.read_bytes() == b"old"


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
