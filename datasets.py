"""The samples of pre-training and their loader."""

import os
from hashlib import blake2b
from itertools import chain, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from infra.archives import read_file
from infra.distributed import get_rank, get_world_size
from infra.signals import shield_worker
from infra.untrusted import check_inside
from transforms import IMAGE_VIEWS, EncodedImage, augment, pack_steps
from utils import InputError

TRIES = 20  # samples tried in a row before all images count as absent


class CaptionDataset(Dataset):
    """Samples of pre-training: a dict of the views that a method takes.

    The key of a sample is (epoch, indices): the first index with a readable image is taken. The
    sample depends on (seed, epoch, that index) alone. Its image views are (3, S, S) uint8, "text"
    is a caption, "ids" are (2,) int64 of the caption's text and the image's bytes (without "text"
    of the image twice), "source" names the sample, and "bad" lists the reasons why the indices
    before it are unreadable.

    Args:
        captions: sequence of (image path, captions).
        root: folder that the image paths are relative to.
        views: names of the views: "text", "ids", or keys of IMAGE_VIEWS.
        preprocessing: of the model, a Preprocessing: size, interpolation and least area of crops.
        seed: int, of crops, augmentations and captions, and of the order of each epoch.
        augment: "cpu", or "device": views are only cropped, and "steps" has each one's other
            augmentations.
        allow_outside: bool, whether image paths may lead out of root.
        archived: bool, whether pixels are those of the archived code (decoding.py).

    Raises InputError for a path that leads out of root, and after TRIES unreadable images.
    """

    def __init__(
        self,
        captions,
        root,
        views,
        preprocessing,
        seed=0,
        augment="cpu",
        allow_outside=False,
        archived=False,
    ):
        if not os.path.isdir(root):
            raise InputError(f"root {root!r} is not a folder; give the folder of the images")
        self.captions, self.root, self.seed = captions, root, seed
        self.image_views = [view for view in views if view in IMAGE_VIEWS]
        self.preprocessing = preprocessing
        self.with_text, self.with_ids = "text" in views, "ids" in views
        self.augments_on_device, self.allow_outside = augment == "device", allow_outside
        self.archived = archived

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, key):
        epoch, indices = key
        bad = []
        for index in indices:
            rng = np.random.default_rng((self.seed, epoch, index))
            path, captions = self.captions[index]
            check_inside(self.root, path, "metadata: image", self.allow_outside)
            try:
                sample = self.read_views(path, rng)
            except InputError as error:
                bad.append(str(error))
                continue
            source = {"index": index, "path": path}
            self.add_caption(sample, source, captions, rng)
            return sample | {"bad": bad, "source": source}
        raise InputError(f"{len(bad)} samples in a row cannot be read; check the root; {bad[0]}")

    def add_caption(self, sample, source, captions, rng):
        """Draws the caption if the views have text; its id goes before the image's."""
        if self.with_text:
            sample["text"] = source["caption"] = captions[rng.integers(len(captions))]
        if self.with_ids:
            image = sample["ids"]
            text = id_of(sample["text"].encode()) if self.with_text else image
            sample["ids"] = torch.tensor([text, image])

    def read_views(self, path, rng):
        return self.make_views(read_file(self.root, path), f"{self.root}/{path}", rng)

    def make_views(self, data, name, rng):
        """The image views of encoded bytes: draws their parameters first, then decodes once.

        "ids" is the image's alone.
        """
        image = EncodedImage(data, name, self.archived)
        form = self.preprocessing
        drawn = {v: IMAGE_VIEWS[v](rng, *image.size, form.crop_min) for v in self.image_views}
        boxes = [box for box, _ in drawn.values()]
        crops = image.crops(boxes, form.image_size, form.interpolation)
        steps = {view: steps for view, (_, steps) in drawn.items()}
        views = dict(zip(drawn, crops, strict=True))
        ids = {"ids": id_of(data)} if self.with_ids else {}
        if self.augments_on_device:
            return views | ids | {"steps": {v: s for v, s in steps.items() if s is not None}}
        return {view: augment(pixels, steps[view]) for view, pixels in views.items()} | ids


def id_of(data):
    """A 64-bit number, equal for equal bytes, in any process; of unequal bytes hardly ever."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


class Collate:
    """Collates samples of a CaptionDataset into a batch, a dict.

    Image views become (B, 3, S, S) uint8, captions (B, L) int64, cut to the longest; "steps" has
    one tensor (transforms.pack_steps) for each view with steps; "bad" and "sources" are lists.
    Captions are tokenized here because one by one, between images, would take twice the time.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples):
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
        notes = {
            "bad": [*chain.from_iterable(columns.pop("bad"))],
            "sources": columns.pop("source"),
        }
        steps = columns.pop("steps", [{}])
        text = {"text": self.tokenize(columns.pop("text"))} if "text" in columns else {}
        views = {view: default_collate(images) for view, images in columns.items()}
        packed = {view: pack_steps([s[view] for s in steps]) for view in steps[0]}
        return views | text | {"steps": packed} | notes

    def tokenize(self, captions):
        return self.tokenizer.trim(self.tokenizer(captions))


def uniform_order(size):
    """An order of an epoch: a function of a NumPy generator that returns a permutation."""
    return lambda rng: rng.permutation(size)


def window_order(lengths, window):
    """An order of an epoch that reads few shards at a time.

    Shards are shuffled, then the samples of each `window` consecutive ones. Memory is that of one
    permutation.

    Args:
        lengths: number of samples of each shard, in the order of the samples.
        window: shards whose samples are shuffled together; 0 for all, as uniform_order does.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    if not window or len(lengths) < 2:
        return uniform_order(ends[-1])

    def order(rng):
        samples, start = np.empty(ends[-1], np.int64), 0
        shards = rng.permutation(len(lengths))
        for first in range(0, len(shards), window):
            end = start
            for shard in shards[first : first + window]:
                count = lengths[shard]
                samples[end : end + count] = np.arange(ends[shard] - count, ends[shard])
                end += count
            rng.shuffle(samples[start:end])
            start = end
        return samples

    return order


class EpochSampler(Sampler):
    """One rank's keys (epoch, indices) of a shuffled epoch of whole batches.

    Every run of world_size * batch_size indices is one global batch, cut into one block per rank:
    its images are the same for any number of ranks. The indices after the first of a key are the
    next ones of the epoch, which replace an unreadable image.

    Args:
        size: number of samples of the dataset.
        batch_size: samples per batch on this rank.
        batches: batches of an epoch on this rank.
        rank, world_size: this rank and the number of ranks.
        seed: int; with the epoch's number it determines the order.
        order: function of a NumPy generator that returns a permutation, by default uniform_order.
    """

    def __init__(self, size, batch_size, batches, rank, world_size, seed=0, order=None):
        self.size, self.seed, self.rank = size, seed, rank
        self.order = order or uniform_order(size)
        self.shape = (batches, world_size, batch_size)
        self.go_to(0)

    def go_to(self, epoch, batch=0):
        """Sets the epoch, and the batch of this rank, that the next iteration starts at."""
        self.epoch, self.batch = epoch, batch

    def __len__(self):
        """The number of keys of a whole epoch."""
        return self.shape[0] * self.shape[2]

    def __iter__(self):
        return self.keys(self.epoch, self.batch)

    def keys(self, epoch, batch=0):
        """Yields the keys of an epoch, from one of its batches on."""
        order = self.order(np.random.default_rng((self.seed, epoch)))
        places = np.arange(np.prod(self.shape)).reshape(self.shape)[batch:, self.rank].ravel()
        tries = min(TRIES, self.size)
        for place in places:
            yield epoch, tuple(order[(place + np.arange(tries)) % self.size].tolist())


class EpochLoader:
    """The batches of one rank, epoch by epoch; len() is their number in an epoch.

    Attributes:
        images: number of images of the dataset.
        batch_size: samples per batch on this rank.
        workers: number of worker processes; they persist from epoch to epoch.
        augments_on_device: bool, whether the batches still need their "steps".
        order: tells what the order depends on beside the seed; "": nothing.
    """

    order = ""

    def __init__(self, dataset, sampler, batch_size, workers, device, collate_fn=None):
        self.images, self.batch_size, self.workers = len(dataset), batch_size, workers
        self.augments_on_device = getattr(dataset, "augments_on_device", False)
        self.sampler = sampler
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # the workers' seeds use up no random number of the run
        )

    def __len__(self):
        return len(self.loader)

    def start(self, epoch, batch=0):
        """An iterator over the batches of an epoch, from number `batch` on."""
        self.sampler.go_to(epoch, batch)
        return iter(self.loader)

    def preview(self, number):
        """One batch of the first `number` samples of epoch 0, made in this process."""
        keys = islice(self.sampler.keys(0), number)
        return self.loader.collate_fn([self.loader.dataset[key] for key in keys])


def count_batches(samples, batch_size, update_freq):
    """The batches of an epoch on one rank, in whole updates.

    Args:
        samples: of the epoch, of all ranks.
        batch_size: samples per rank and micro-batch.
        update_freq: micro-batches per update.

    Raises InputError if the samples are too few for one update.
    """
    world_size = get_world_size()
    batches = samples // (batch_size * world_size)
    if not batches:
        raise InputError(
            f"batch size {batch_size} on {world_size} ranks is more than the {samples} "
            "training images; lower it"
        )
    if batches < update_freq:
        raise InputError(
            f"{update_freq} micro-batches per update are more than the {batches} batches of an "
            "epoch; lower their number"
        )
    return batches - batches % update_freq


def open_loader(dataset, batch_size, workers, device, update_freq=1, collate_fn=None, order=None):
    """The EpochLoader of this rank: whole updates of whole batches, shuffled anew every epoch.

    Args:
        dataset: is indexed by the keys of EpochSampler, and has a `seed` for it.
        batch_size: samples per rank and micro-batch.
        workers: worker processes per rank; with 0 this process makes the batches.
        device: torch.device of the training; batches are in pinned memory if that is CUDA.
        update_freq: micro-batches per update.
        collate_fn: function of a list of samples, by default PyTorch's.
        order: that of an epoch, as EpochSampler takes it.

    Raises InputError if the dataset is too small for one update.
    """
    batches = count_batches(len(dataset), batch_size, update_freq)
    shape = len(dataset), batch_size, batches, get_rank(), get_world_size()
    sampler = EpochSampler(*shape, dataset.seed, order)
    return EpochLoader(dataset, sampler, batch_size, workers, device, collate_fn)
