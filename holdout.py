"""Holds out pairs of a caption set: a seed draws images, and no image is in both parts."""

from dataclasses import dataclass

import numpy as np

from infra.arrow import Source, describe, write_captions
from infra.rows import Dropped, Files
from utils import InputError


class RowFiles(Files):
    """The file of Captions, of which `done` of `rows` rows are read."""

    def __init__(self, path, rows):
        super().__init__([path])
        self.rows, self.done = rows, 0

    def share(self):
        return self.done / self.rows


@dataclass
class Remaining(Source):
    """The rows that are not held out; the facts of their file say how many each shard has."""

    facts: dict

    def chunks(self, facts, title):
        return super().chunks(facts | self.facts, title)


class Split:
    """The two parts of a caption set.

    Attributes:
        held: {image path: captions} of the images held out, in the order of the set.
        lengths: number of rows of the other part in each shard, see arrow.Captions.
        repeated: captions held out that an image of the other part has too, each counted once;
            known when `remaining` is read to its end.
    """

    def __init__(self, pairs, number, seed):
        """
        Args:
            pairs: Captions.
            number: of images to hold out.
            seed: int, of the draw.
        """
        self.pairs, self.repeated = pairs, 0
        names, self.held = set(), {}
        for row in np.random.default_rng(seed).permutation(len(pairs)).tolist():
            if len(names) == number:
                break
            names.add(pairs[row][0])
        if len(names) < number or number == len(pairs):
            raise InputError(
                f"metadata {pairs.path} has {len(names)} images, too few to hold out {number}"
            )
        is_held = np.zeros(len(pairs), bool)
        for row, (path, captions) in enumerate(self.rows()):
            if path in names:
                is_held[row] = True
                self.held.setdefault(path, []).extend(captions)
        shards = np.split(~is_held, np.cumsum(pairs.lengths)[:-1])
        self.lengths = [int(kept.sum()) for kept in shards]

    def rows(self):
        return map(self.pairs.__getitem__, range(len(self.pairs)))

    def remaining(self, files):
        """Yields the other part's rows, and a Dropped for each row of an image held out."""
        texts, repeated = {text for own in self.held.values() for text in own}, set()
        for files.done, (path, captions) in enumerate(self.rows(), start=1):
            if path in self.held:
                yield Dropped("held out")
            else:
                repeated.update(texts.intersection(captions))
                yield path, captions
        self.repeated = len(repeated)


def unchanged(row):
    return row


def hold_out(pairs, number, seed, output, held_out):
    """Writes both parts as Arrow files; returns the result in words, three lines.

    Args:
        pairs, number, seed: see Split.
        output: path of the other pairs.
        held_out: path of the pairs held out; rows of one image become one.
    """
    split, key = Split(pairs, number, seed), ["hold out", number, seed]
    files = RowFiles(pairs.path, len(pairs))
    write_captions(held_out, Source(files, iter(split.held.items()), unchanged), key)
    facts = {"lengths": split.lengths} if "lengths" in pairs.facts else {}
    rest = Remaining(files, split.remaining(files), unchanged, facts)
    counts = write_captions(output, rest, key)
    texts = sum(map(len, split.held.values()))
    return (
        f"{held_out}: {number:,} images, {texts:,} captions, seed {seed}\n"
        f"{output}: {describe(counts)}\n"
        f"{split.repeated:,} of the captions held out are also captions of other images"
    )
