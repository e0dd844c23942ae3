"""The byte-pair encoding against the archived code's ids, and the shape of its rows."""

import hashlib

import pytest
import torch

from tokenizer import VOCABULARY, SimpleTokenizer

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer()


def test_ids_equal_the_archived_code(tokenizer, reference):
    for row in reference["tokens"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
    assert len(tokenizer.encoder) == 49408


def test_the_vocabulary_is_openais():
    digest = hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_decode_inverts_encode_up_to_blanks(tokenizer):
    for text in ("a photo of a dog.", "crème brûlée & 第2回", "🚲🚲 it's"):
        decoded = tokenizer.decode(tokenizer.encode(text))
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_rows(tokenizer):
    one, two = tokenizer("a dog"), tokenizer(["a dog", "two dogs on a bench"])
    assert one.shape == (77,) and two.shape == (2, 77) and two.dtype == torch.int64
    assert torch.equal(one, two[0])
    assert one[:4].tolist() == [START, *tokenizer.encode("a dog"), END]
    assert not one[4:].any()
    assert tokenizer("")[:3].tolist() == [START, END, 0]
    assert tokenizer([]).shape == (0, 77)


def test_the_end_token_survives_truncation(tokenizer):
    row = tokenizer("dog " * 200)
    assert row[-1] == END and row.argmax() == 76 and row[0] == START


def test_special_tokens_in_a_text_are_themselves(tokenizer):
    assert tokenizer.encode("<|endoftext|>") == [END]


def test_trim_rounds_up_to_a_few_lengths(tokenizer):
    for words, length in ((1, 16), (14, 16), (15, 32), (46, 48), (62, 64), (63, 77), (99, 77)):
        assert tokenizer.trim(tokenizer(["dog " * words, "a"])).shape == (2, length)


def test_context_length(tokenizer):
    assert tokenizer("dog " * 50, context_length=20).tolist()[-1] == END
