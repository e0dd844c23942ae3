"""Folders of tiny text models, as transformers saves them, with tokenizers made here."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["picture", "photo", "thing", "number", "a", "of", "the", "class", "digit", "Dog", "dog"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 90, "vocab_size": 400}
DROPOUT_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def roberta_tokenizer():
    """Bytes and whole words, case and all; <pad> is 1."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return found, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def bert_tokenizer():
    """Lower-cased words and letters; [PAD] is 0."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(w.lower() for w in WORDS[:-1])]
    symbols += [s for c in letters for s in (c, f"##{c}") if s not in symbols]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    found = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return found, special | {"unk_token": "[UNK]"}


TOKENIZERS = {"roberta": roberta_tokenizer, "bert": bert_tokenizer}


def write_text_model(folder, kind="roberta", seed=0, **config):
    """Writes a tiny model of that model_type with its tokenizer; returns the folder."""
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    tokenizer, special = TOKENIZERS[kind]()
    AutoModel.from_config(AutoConfig.for_model(kind, **(SIZES | config))).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def change_json(path, **entries):
    """Adds entries to a JSON file, which need not be there."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | entries))
