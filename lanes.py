"""The order of a stream of shards, and its loader.

A stream has no index, so its order is that of lanes: one for each loader worker of each rank, with
shards of its own. Pair number k of a lane is a function of (seed, epoch, lane, k) and of the number
of lanes. An epoch ends after its number of samples, however many the shards hold: what is left of
them is not read, and a lane whose shards hold too few reads others.
"""

import os
from collections import deque
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from datasets import TRIES, CaptionDataset, EpochLoader, count_batches
from infra.distributed import get_rank, get_world_size
from stream_shards import RETRIES, Lost, read_shard
from utils import InputError

BUFFER = 512  # pairs of a lane that are shuffled together


@dataclass
class Pair:
    name: str
    image: bytes
    captions: list
    turn: int  # 0 the first time that a lane reads its shards in an epoch


def shuffled(items, rng, size):
    """The items in another order, with `size` of them in memory."""
    kept = []
    for item in items:
        kept.append(item)
        if len(kept) >= size:
            at = rng.integers(len(kept))
            kept[at], kept[-1] = kept[-1], kept[at]
            yield kept.pop()
    rng.shuffle(kept)
    yield from kept


class Lane:
    """The pairs of one lane in an epoch, from number `place` on.

    Those before are read again, but no image of theirs is decoded. A lane that comes to the end of
    its shards continues with those of another permutation.
    """

    def __init__(self, stream, seed, epoch, lane, lanes, place):
        self.stream, self.seed, self.place = stream, (seed, epoch), place
        self.lane, self.lanes, self.key = lane, lanes, (epoch, lane, lanes)
        self.ahead, self.faults, self.lengths, self.empty = deque(), [], [], 0
        self.pairs = self.read()
        for _ in range(place):
            next(self.pairs)
        self.faults = []  # those were counted with the pairs before

    def shards(self, turn):
        """Yields (url, part, parts): pairs number part, part + parts, ... of a shard are its own.

        Lanes have parts of a shard if there are more of them than shards.
        """
        urls, number, parts, part = self.stream.urls, len(self.stream.urls), 1, 0
        if self.stream.weights:
            rng = np.random.default_rng((*self.seed, 1, self.lane))
            ends = np.cumsum(self.stream.weights)
            while True:
                drawn = np.searchsorted(ends, rng.random() * ends[-1], side="right")
                yield urls[drawn], part, parts
        order = np.random.default_rng((*self.seed, 0, turn)).permutation(number)
        mine = order[self.lane :: self.lanes]
        if self.lanes > number:
            first = self.lane % number
            mine, part = order[first : first + 1], self.lane // number
            parts = len(range(first, self.lanes, number))
        for shard in mine:
            yield urls[shard], part, parts

    def read(self):
        for turn in count():
            pairs = (pair for shard in self.shards(turn) for pair in self.read_part(turn, *shard))
            rng = np.random.default_rng((*self.seed, 2, self.lane, turn))
            yield from shuffled(pairs, rng, BUFFER)

    def read_part(self, turn, url, part, parts):
        """Yields the Pairs of a part of a shard."""
        number = 0
        try:
            for pair in read_shard(url, self.stream.keys):
                if isinstance(pair, str):
                    self.faults += [pair] if part == 0 else []
                    continue
                if number % parts == part:
                    self.empty = 0
                    yield Pair(*pair, turn)
                number += 1
            self.lengths.append(number)
        except Lost as reason:
            self.lose(url, number, parts, reason)

    def lose(self, url, number, parts, reason):
        """Counts the rest of a shard as long as the mean of the whole ones of the lane."""
        urls, lengths = self.stream.urls, self.lengths
        mean = sum(lengths) / len(lengths) if lengths else self.stream.samples / len(urls)
        lost = max(round((mean - number) / parts), 1)
        text = f"{url} failed {RETRIES + 1} times after {number} pairs: {reason}"
        self.faults += [f"{text}; about {lost} samples are lost"] * lost
        self.empty += not number
        if self.empty >= min(len(urls), TRIES):
            raise InputError(f"{self.empty} shards in a row give no sample; check them; {text}")

    def peek(self, number):
        """(pair `number` places ahead, a reason for each sample that was lost on the way to it)."""
        while len(self.ahead) <= number:
            pair = next(self.pairs)
            self.ahead.append((pair, self.faults))
            self.faults = []
        return self.ahead[number]

    def advance(self):
        self.place += 1
        self.ahead.popleft()


class StreamDataset(CaptionDataset):
    """Samples of a Stream, as those of a CaptionDataset; keys are (epoch, lane, lanes, place).

    A pair whose image cannot be read is replaced by the next one of its lane. Keys of a lane in
    order are read on; any other key begins its lane anew.
    """

    def __init__(self, stream, views, preprocessing, *options):
        super().__init__(stream, os.curdir, views, preprocessing, *options)
        self.lane = None

    def close(self):
        """Ends the command that is being read."""
        if self.lane:
            self.lane.pairs.close()
        self.lane = None

    def __getitem__(self, key):
        *where, place = key
        if not self.lane or (self.lane.key, self.lane.place) != (tuple(where), place):
            self.close()
            self.lane = Lane(self.captions, self.seed, *where, place)
        bad = [*self.lane.peek(0)[1]]
        for ahead in range(TRIES):
            pair, _ = self.lane.peek(ahead)
            rng = np.random.default_rng((self.seed, where[0], 3, where[1], place + ahead))
            try:
                sample = self.make_views(pair.image, pair.name, rng)
            except InputError as error:
                bad += [str(error)] if not ahead else []  # the others count in their own places
                continue
            source = {"lane": where[1], "place": place + ahead, "path": pair.name}
            self.add_caption(sample, source, pair.captions, rng)
            self.lane.advance()
            return sample | {"bad": bad, "source": source | {"turn": pair.turn}}
        raise InputError(f"{TRIES} samples in a row cannot be read; check the shards; {bad[-1]}")


class StreamSampler(Sampler):
    """One rank's keys of an epoch of a StreamDataset, for `workers` loader workers.

    Batch number b is of lane b % workers of the rank: each worker reads a single one.
    """

    def __init__(self, batch_size, batches, rank, world_size, workers):
        self.batch_size, self.batches, self.workers = batch_size, batches, workers
        self.first, self.lanes = rank * workers, world_size * workers
        self.go_to(0)

    def go_to(self, epoch, batch=0):
        self.epoch, self.batch = epoch, batch

    def __len__(self):
        return self.batches * self.batch_size

    def __iter__(self):
        return self.keys(self.epoch, self.batch)

    def keys(self, epoch, batch=0):
        for number in range(batch, self.batches):
            round_, worker = divmod(number, self.workers)
            for place in range(round_ * self.batch_size, (round_ + 1) * self.batch_size):
                yield epoch, self.first + worker, self.lanes, place


class StreamLoader(EpochLoader):
    """An EpochLoader of a StreamDataset; `order` tells what its order depends on."""

    def __init__(self, dataset, sampler, *options):
        super().__init__(dataset, sampler, *options)
        ranks = sampler.lanes // sampler.workers
        self.order = f"a stream by {ranks} ranks x {sampler.workers} workers"
        self.is_told = False

    def start(self, epoch, batch=0):
        return self.watch(super().start(epoch, batch), epoch)

    def watch(self, batches, epoch):
        """The batches; says once if an epoch is longer than the shards of a lane."""
        for batch in batches:
            turns = [source.pop("turn") for source in batch["sources"]]
            if any(turns) and not self.is_told:
                self.is_told = True
                print(
                    f"note: shards of rank {get_rank()} hold fewer samples than its share of epoch "
                    f"{epoch}; it reads others in their place, some of them for the second time",
                    flush=True,
                )
            yield batch

    def preview(self, number):
        try:
            return super().preview(number)
        finally:  # workers that are forked later must not keep its command alive
            self.loader.dataset.close()


def open_loader(dataset, batch_size, workers, device, update_freq=1, collate_fn=None):
    """The StreamLoader of this rank, as datasets.open_loader: whole updates of whole batches."""
    batches = count_batches(len(dataset), batch_size, update_freq)
    shape = batch_size, batches, get_rank(), get_world_size(), max(workers, 1)
    sampler = StreamSampler(*shape)
    return StreamLoader(dataset, sampler, batch_size, workers, device, collate_fn)
