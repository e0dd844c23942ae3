"""Folders of open_clip and Hugging Face: what is not ours is refused by its entry."""

import json

import pytest
from test_pretrained import (  # noqa: F401
    CONFIG,
    assert_same_model,
    small,
    small_clip,
    write_folder,
)

import formats
import model_configs
import towers
from pretrained import load_model
from utils import InputError


@pytest.mark.parametrize("name", ["CLIP_SMALL", "CLIP_SMALL-quickgelu"])
def test_a_folder_of_hugging_faces_comes_back(name, tmp_path, capsys):
    model, row = small(name), towers.TOWERS[name.partition("_")[2]]
    formats.write_huggingface(formats.Source(model, name, row), tmp_path, tmp_path)
    found, args = load_model(tmp_path)
    assert args.model == name and not capsys.readouterr().err
    assert_same_model(found, model)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, entry, match in (
        ("text_config", {"hidden_act": "relu"}, "its towers have activations"),
        ("vision_config", {"num_attention_heads": 4}, "its heads have width 16; only 64 is known"),
        ("vision_config", {"num_attention_heads": 0}, "is of another kind: ZeroDivisionError"),
    ):
        changed = config | {part: config[part] | entry}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=match):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(InputError, match="its model_type is 'bert'; only 'clip' is known here"):
        load_model(tmp_path)


def changed(section, **values):
    return CONFIG | {section: CONFIG[section] | values}


ROBERTA = {"hf_model_name": "roberta-base"}
BAD = {
    "no config": (None, "has no open_clip_config.json"),
    "no weights": (CONFIG, "has none of open_clip_model.safetensors, open_clip_pytorch_model.bin"),
    "a list": ([], "is no JSON object"),
    "another object": ({"a": 1}, "is of another kind: KeyError"),
    "a text": (CONFIG | {"model_cfg": "x"}, "is of another kind"),
    "another text tower": (
        changed("model_cfg", text_cfg={"hf_model_name": "mt5-base"}),
        "its text tower is 'mt5-base'; only roberta-base, xlm-roberta-base, xlm-roberta-large are",
    ),
    "another pooling of texts": (
        changed("model_cfg", text_cfg=ROBERTA | {"hf_pooler_type": "cls_pooler"}),
        "its hf_pooler_type 'cls_pooler'; only 'mean_pooler' is known here",
    ),
    "another projection of texts": (
        changed("model_cfg", text_cfg=ROBERTA | {"hf_proj_type": "linear"}),
        "its hf_proj_type 'linear'; only 'mlp' is known here",
    ),
    "another tokenizer": (
        changed("model_cfg", text_cfg=ROBERTA | {"hf_tokenizer_name": "bert-base-uncased"}),
        "its hf_tokenizer_name 'bert-base-uncased'; only 'roberta-base' is known here",
    ),
    "a hostile text tower": (
        changed("model_cfg", text_cfg={"hf_model_name": ["x"]}),
        "is of another kind: TypeError",
    ),
    "squashed images": (changed("preprocess_cfg", resize_mode="squash"), "resize_mode 'squash'"),
    "no numbers": (changed("preprocess_cfg", mean=["a", 0, 0]), r"mean \['a', 0, 0\] is not"),
    "another filter": (changed("preprocess_cfg", interpolation="x"), "choose from bilinear, bic"),
    "texts without a mask": (
        changed("model_cfg", text_cfg={"no_causal_mask": True}),
        "its no_causal_mask True is unknown here",
    ),
    "another pooling": (
        changed("model_cfg", vision_cfg={"pool_type": "avg"}),
        "its pool_type 'avg'; only 'tok' is known here",
    ),
    "other heads": (
        changed("model_cfg", text_cfg={"width": 64}),  # open_clip's usual number is 8
        "its heads 8; only 1 is known here",
    ),
    "timm's pooling": (
        changed("model_cfg", vision_cfg={"timm_model_name": "test_vit"}),
        "its timm_pool 'avg'; only '' is known here",
    ),
    "oblong images": (
        changed("model_cfg", vision_cfg={"image_size": [32, 48]}),
        r"its image_size \[32, 48\] is no square",
    ),
    "our entry": (CONFIG | {"slip": {"model": "CLIP_ViT-Z", "preprocessing": {}}}, "unknown model"),
    "of no kind": (CONFIG | {"slip": {"model": 7, "preprocessing": {}}}, "is of another kind"),
}


def test_a_config_with_nothing_special_opens():
    off = {"ls_init_value": None, "no_ln_pre": False, "act_kwargs": {}, "pool_type": "tok"}
    sizes = {"timm_model_name": "convnext_small", "timm_pool": "", "image_size": [320, 320]}
    config = changed("model_cfg", vision_cfg=off | sizes, text_cfg={"no_causal_mask": False})
    name, form = model_configs.read_open_clip(config, "")
    assert name == "convnext_small" and form["image_size"] == 320


@pytest.mark.parametrize("fault", BAD)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, fault):
    config, match = BAD[fault]
    write_folder(tmp_path / "x", small(), config)
    (tmp_path / "x" / "open_clip_config.json").unlink() if config is None else None
    if fault == "no weights":
        (tmp_path / "x" / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=match) as error:
        load_model(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value) and "\n" not in str(error.value)
