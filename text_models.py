"""Descriptions of Hugging Face's text models: a configuration and a tokenizer.json, as plain data.

Our checkpoints hold them beside the weights, so that they open without the hub. Of a configuration
only sizes and rates of known architectures are taken, so that a stranger's can name no code.
"""

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from infra import hub
from infra.untrusted import named_failures
from tokenizer import JSONTokenizer, check_tokenizer
from utils import InputError, write_json

DESCRIPTION = CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

PADDING = {"bert": 0, "camembert": 1, "mpnet": 1, "roberta": 1, "xlm-roberta": 1}  # by model_type
COUNTS = {  # entries of a configuration, and the largest that is believed
    "vocab_size": 2**21,
    "hidden_size": 2**14,
    "num_hidden_layers": 2**8,
    "num_attention_heads": 2**8,
    "intermediate_size": 2**16,
    "max_position_embeddings": 2**16,
    "type_vocab_size": 2**8,
    "relative_attention_num_buckets": 2**10,
    "pad_token_id": 2**21,
}
SHARES = ("layer_norm_eps", "initializer_range")
SHARES += ("hidden_dropout_prob", "attention_probs_dropout_prob")
CHOICES = {  # other entries that embeddings depend on, and the values that are known
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "position_embedding_type": ("absolute", None),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "is_encoder_decoder"), (False, None)),
}


# ---------------------------------------------------------------------------------------------
# Configuration and tokenizer, as plain data


@dataclass(frozen=True)
class TextModel:
    """A text tower without its weights, and its tokenizer.

    name: on the hub, or the folder's. config: as `known_entries` gives it. data: of a
    tokenizer.json; None: the hub has it. weights: path of pretrained ones, "" if its folder has
    none; None: they come from elsewhere.
    """

    name: str
    config: dict = field(repr=False)
    data: bytes | None = field(default=None, repr=False)
    weights: str | None = None

    @cached_property
    def tokenizer_json(self):
        """Bytes. Raises InputError if they should come from the hub and do not."""
        return self.data or read_small(fetch(self.name, [TOKENIZER]))

    def create_tokenizer(self, context_length):
        size, pad = self.config["vocab_size"], self.config["pad_token_id"]
        return JSONTokenizer(self.name, self.tokenizer_json, size, pad, context_length)

    def write_tokenizer(self, folder):
        """As transformers reads it."""
        padding = self.create_tokenizer(1).padding
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding}
        (folder / TOKENIZER).write_bytes(self.tokenizer_json)
        write_json(folder / "tokenizer_config.json", settings)

    def write(self, folder):
        """Its configuration and tokenizer, as `open_text_model` and transformers read them."""
        folder.mkdir(exist_ok=True)
        write_json(folder / CONFIG, self.config)
        self.write_tokenizer(folder)

    def state_dict(self):
        data = torch.frombuffer(bytearray(self.tokenizer_json), dtype=torch.uint8)
        return {"name": self.name, "config": json.dumps(self.config), "tokenizer": data}

    def load_state_dict(self, state):
        """Raises ValueError if it is another one's."""
        other = TextModel.from_state(state)
        if (other.config, other.data) != (self.config, self.tokenizer_json):
            raise ValueError("another text model")

    @classmethod
    def from_state(cls, state):
        """The inverse of `state_dict`. Raises InputError for data of another kind."""
        with named_failures("its text model"):
            name, config, data = (state[key] for key in ("name", "config", "tokenizer"))
            data = data.numpy().tobytes()
            check_tokenizer(data)
            return cls(str(name)[:200], known_entries(json.loads(config)), data)


def known_entries(config):
    """The entries of a configuration that build a tower.

    Raises InputError for a value that is not known here.
    """
    if (kind := config.get("model_type")) not in PADDING:
        known = ", ".join(PADDING)
        raise InputError(f"its model_type is {repr(kind)[:80]}; choose one of {known}")

    def is_known(key, value):
        if key in COUNTS:
            least = 0 if key in ("num_hidden_layers", "pad_token_id") else 1
            return type(value) is int and least <= value <= COUNTS[key]
        if key in SHARES:
            return type(value) in (int, float) and 0 <= value < 1
        return value in CHOICES[key]

    found = {"model_type": kind, "pad_token_id": PADDING[kind]}
    for key in (*COUNTS, *SHARES, *CHOICES):
        if key in config and not is_known(key, config[key]):
            raise InputError(f"its {key} {repr(config[key])[:80]} is unknown here")
        if config.get(key) is not None:
            found[key] = config[key]
    if missing := [key for key in ("vocab_size", "hidden_size") if key not in found]:
        raise InputError(f"it has no {missing[0]}")
    return found


def configuration(model_type, vocab_size, hidden_size=768, num_hidden_layers=12):
    """RoBERTa's."""
    return {
        "model_type": model_type,
        "pad_token_id": 1,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 64,
        "intermediate_size": 4 * hidden_size,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


TEXTS = {  # the text towers of open_clip's rows
    name: TextModel(name, config)
    for name, config in {
        "roberta-base": configuration("roberta", 50265),
        "xlm-roberta-base": configuration("xlm-roberta", 250002),
        "xlm-roberta-large": configuration("xlm-roberta", 250002, 1024, 24),
    }.items()
}


def with_text(tower, text_model):
    """The row with a text tower of Hugging Face, or with CLIP's if there is none."""
    tokenizer, pooling = ("huggingface", "mean") if text_model else ("clip", "argmax")
    form = replace(tower.preprocessing, tokenizer=tokenizer, pooling=pooling)
    return replace(tower, preprocessing=form, text_model=text_model)


# ---------------------------------------------------------------------------------------------
# Finding one


def fetch(name, names):
    """The path of the first of some files of the hub."""
    try:
        return hub.fetch(name, names)
    except InputError as error:
        raise InputError(
            f"text model {name}: {error}; download its files elsewhere and give their folder"
        ) from error


def read_small(path, largest=2**25):
    """The bytes of a file; XLM-R's tokenizer.json has 9 million."""
    if not os.path.isfile(path):
        raise InputError(
            f"text model: {path} is absent; save model and tokenizer there by transformers' "
            "save_pretrained"
        )
    if (size := os.path.getsize(path)) > largest:
        raise InputError(f"text model: {path} has {size} bytes; {largest} are the most")
    return Path(path).read_bytes()


def open_text_model(source):
    """The TextModel of a folder, as transformers saves it, or of a name on the hub.

    Raises InputError if there is none, or if its architecture is not known here.
    """
    name = source
    if os.path.isdir(source):
        name = os.path.basename(os.path.abspath(source))
        config, tokenizer, *paths = (os.path.join(source, x) for x in (CONFIG, TOKENIZER, *WEIGHTS))
        path = next(filter(os.path.isfile, paths), "")
        config, tokenizer = read_small(config), read_small(tokenizer)
    elif os.path.exists(source) or source.startswith((".", "/", "~")):
        raise InputError(f"text model {source} is no folder; check the path")
    else:
        config, tokenizer = (read_small(fetch(source, [x])) for x in (CONFIG, TOKENIZER))
        path = fetch(source, WEIGHTS)
    with named_failures(f"text model {source}"):
        check_tokenizer(tokenizer)
        return TextModel(name, known_entries(json.loads(config)), tokenizer, path)
