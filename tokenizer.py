"""Text to token ids: CLIP's byte-pair encoding, and tokenizers that Hugging Face's library saved.

CLIP's vocabulary file is OpenAI's (MIT licence): one merge a line, most frequent first.
"""

import gzip
import html
import itertools
import json
import math
import os
from functools import cache, cached_property, lru_cache
from pathlib import Path

import ftfy
import regex
import torch

from infra.untrusted import SLACK, memory_limit, named_failures
from utils import InputError

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 49152 - 256 - 2  # the file holds more than CLIP's vocabulary uses
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTHS = (16, 32, 48, 64)  # tokens that a batch is cut to; see trim
PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def byte_symbols():
    """A printable character for each byte, in the vocabulary's order.

    Printable bytes of Latin-1 stand for themselves and come first; the rest follow from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def clean(text):
    """Mends mis-decoded characters, unescapes HTML (twice: it is often doubled), joins blanks."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@cache
def read_merges(path):
    """The pairs of symbols to join, best first."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]  # the first line is a header
    return [tuple(line.split()) for line in lines]


class Tokenizer:
    """Called with texts it returns rows of `context_length` ids; `lengths` counts those in use."""

    def trim(self, tokens, buckets=LENGTHS):
        """Rows of ids (n, L) cut to the longest text, rounded up to one of few lengths.

        Embeddings stay the same: no text tower looks beyond a text's end. Few lengths, because each
        is compiled anew; `buckets` None cuts exactly.
        """
        longest = int(self.lengths(tokens).max())
        fitting = [longest] if buckets is None else [b for b in buckets if b >= longest]
        return tokens[:, : min(fitting, default=None)]


class SimpleTokenizer(Tokenizer):
    """Lower-cases, splits and encodes text; called, returns rows of `context_length` ids."""

    def __init__(self, path=VOCABULARY, context_length=77):
        self.path, self.context_length, merges = path, context_length, read_merges(path)
        self.symbols = byte_symbols()
        singles = list(self.symbols.values())
        words = singles + [s + WORD_END for s in singles] + ["".join(m) for m in merges]
        self.decoder = dict(enumerate([*words, START, END]))
        self.encoder = {token: i for i, token in self.decoder.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bytes = {symbol: byte for byte, symbol in self.symbols.items()}
        self.start, self.end = self.encoder[START], self.encoder[END]
        # Bounded: a loader's worker meets millions of different words.
        self.merge = lru_cache(maxsize=2**15)(self._merge)

    def __reduce__(self):  # a loader's worker makes its own, with a cache of its own
        return type(self), (self.path, self.context_length)

    def _merge(self, word):
        """The token ids of one word (a string of byte symbols): joins the best-ranked pairs."""
        parts = [*word[:-1], word[-1] + WORD_END]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, MERGES))
            if best not in self.ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    joined.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            parts = joined
        return [self.encoder[part] for part in parts]

    def encode(self, text):
        """The ids of a text, without start and end."""
        ids = []
        for piece in PIECES.findall(clean(text).lower()):
            if piece in (START, END):
                ids.append(self.encoder[piece])
            else:
                ids += self.merge("".join(self.symbols[byte] for byte in piece.encode()))
        return ids

    def decode(self, ids):
        """The text of ids; a word's end becomes a blank."""
        text = "".join(self.decoder[int(i)] for i in ids)
        text = text.replace(WORD_END, " ")
        raw = b"".join(bytes([self.bytes[c]]) if c in self.bytes else c.encode() for c in text)
        return raw.decode("utf-8", errors="replace")

    def __call__(self, texts, context_length=None):
        """One string -> (L,) int64; a list of n strings -> (n, L), with L the context length.

        Start token, ids, end token, zeros. A text too long is cut before the end token, because
        the text tower pools at the end token.
        """
        length = context_length or self.context_length
        if isinstance(texts, str):
            return self([texts], length)[0]
        result = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(result, texts, strict=True):
            ids = [self.start, *self.encode(text)[: length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return result

    def lengths(self, tokens):
        """(n, L) ids -> (n,): the tokens of each text, start and end included."""
        return (tokens == self.end).int().argmax(-1) + 1


# ---------------------------------------------------------------------------------------------
# Hugging Face


def check_tokenizer(data, largest=2**25):
    """Raises InputError for bytes of a tokenizer.json that is refused.

    One by which few letters become endless tokens would fill the memory; one that drops merges at
    random would give a text new tokens each time.
    """
    if len(data) > largest:
        raise InputError(f"its tokenizer has {len(data)} bytes, more than {largest}")
    with memory_limit(32 * len(data) + SLACK):
        content = json.loads(data)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError("its tokenizer.json describes no tokenizer")
    changes = [*parts_of(content.get("normalizer")), *parts_of(content.get("pre_tokenizer"))]
    added = [*parts_of(content.get("post_processor"))]
    inserted = [len(str(part.get("content", part.get("prepend", "")))) for part in changes]
    ids = sum(len(part["ids"]) for part in added if isinstance(part.get("ids"), list))
    if max(len(changes), len(added), ids) > 64 or math.prod(max(1, n) for n in inserted) > 2**10:
        raise InputError("its tokenizer.json makes texts too long")
    if content["model"].get("dropout"):
        raise InputError("its tokenizer.json has a dropout; set it to null")


def parts_of(value):
    """The dicts within parsed JSON."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting += value.values() if isinstance(value, dict) else ()
        waiting += value if isinstance(value, list) else ()


class JSONTokenizer(Tokenizer):
    """That of a tokenizer.json, which check_tokenizer has seen; texts are cleaned and padded.

    name: for errors. data: of the file. vocabulary: the ids that the text tower knows. pad: the id
    of padding, beyond a text's end.
    """

    def __init__(self, name, data, vocabulary, pad, context_length=77):
        self.args = name, data, vocabulary, pad
        self.name, self.data, self.vocabulary, self.pad = self.args
        self.context_length = context_length

    def __reduce__(self):  # the library's object is made anew in a loader's worker
        return type(self), (*self.args, self.context_length)

    @cached_property
    def backend(self):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a loader has its own processes
        with named_failures(f"tokenizer of {self.name}"):
            import tokenizers

            found = tokenizers.Tokenizer.from_buffer(self.data)
            found.no_padding()
            return found

    @property
    def padding(self):
        """The token, as text."""
        return self.backend.id_to_token(self.pad)

    def __call__(self, texts, context_length=None):
        """One string -> (L,) int64; a list of n strings -> (n, L), with L the context length."""
        length = context_length or self.context_length
        if isinstance(texts, str):
            return self([texts], length)[0]
        result = torch.full((len(texts), length), self.pad)
        with named_failures(f"tokenizer of {self.name}"):
            self.backend.enable_truncation(length)
            rows = [row.ids[:length] for row in self.backend.encode_batch([*map(clean, texts)])]
        for row, ids in zip(result, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        if len(texts) and not int(result.max()) < self.vocabulary:
            raise InputError(f"tokenizer of {self.name}: its text tower has fewer tokens")
        return result

    def lengths(self, tokens):
        """(n, L) ids -> (n,): the tokens of each text, special ones included."""
        places = torch.arange(1, tokens.shape[1] + 1)
        return ((tokens != self.pad) * places).amax(1).clamp(min=1)


TOKENIZERS = {  # by the name of preprocessing.py
    "clip": lambda length, text_model: SimpleTokenizer(context_length=length),
    "huggingface": lambda length, text_model: text_model.create_tokenizer(length),
}


def create_tokenizer(preprocessing, text_model=None):
    """The tokenizer that a model's preprocessing names; text_model: a TextModel or None."""
    return TOKENIZERS[preprocessing.tokenizer](preprocessing.context_length, text_model)
