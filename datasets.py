"""The samples of pre-training and their loader."""

import os
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from infra.archives import read_file
from infra.distributed import get_rank, get_world_size
from infra.signals import shield_worker
from infra.untrusted import check_inside
from transforms import IMAGE_VIEWS, EncodedImage, augment, group_steps
from utils import InputError

TRIES = 20  # samples tried in a row before the images count as absent altogether


class CaptionDataset(Dataset):
    """Samples of pre-training: a dict of the views a method takes.

    The key of a sample is (epoch, indices): the first index whose image can be read is taken. What
    a sample becomes depends on (seed, epoch, that index) alone. Image views are (3, S, S) uint8,
    "text" is a caption, "source" says which sample it is, "bad" why the indices before it cannot be
    read. With augment "device" the views are only cropped, and "steps" holds what is left for each.
    Raises InputError for a path that leads out of root, unless allow_outside.
    """

    def __init__(
        self, captions, root, views, image_size, seed=0, augment="cpu", allow_outside=False
    ):
        if not os.path.isdir(root):
            raise InputError(f"--root {root!r} is not a folder; give the folder of the images")
        self.captions, self.root, self.seed = captions, root, seed
        self.image_views = [view for view in views if view in IMAGE_VIEWS]
        self.image_size, self.with_text = image_size, "text" in views
        self.on_device, self.allow_outside = augment == "device", allow_outside

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
            if self.with_text:
                sample["text"] = source["caption"] = captions[rng.integers(len(captions))]
            return sample | {"bad": bad, "source": source}
        raise InputError(f"{len(bad)} samples in a row cannot be read; check --root; {bad[0]}")

    def read_views(self, path, rng):
        """The image views: their parameters are drawn first, then the image is decoded once."""
        image = EncodedImage(read_file(self.root, path), f"{self.root}/{path}")
        drawn = {view: IMAGE_VIEWS[view](rng, *image.size) for view in self.image_views}
        crops = image.crops([box for box, _ in drawn.values()], self.image_size)
        steps = {view: steps for view, (_, steps) in drawn.items()}
        views = dict(zip(drawn, crops, strict=True))
        if self.on_device:
            return views | {"steps": steps}
        return {view: augment(pixels, steps[view]) for view, pixels in views.items()}


class Collate:
    """A batch of samples: captions as (B, L) int64, "steps" grouped by view, "bad" and "sources"
    as lists.

    Captions are tokenized here, not one by one between images, which would cost twice the time,
    and cut to the longest.
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
        text = {"text": self.tokens(columns.pop("text"))} if "text" in columns else {}
        views = {view: default_collate(images) for view, images in columns.items()}
        grouped = {view: group_steps([s[view] for s in steps]) for view in steps[0]}
        return views | text | {"steps": grouped} | notes

    def tokens(self, texts):
        return self.tokenizer.trim(self.tokenizer(texts))


class EpochSampler(Sampler):
    """One rank's keys (epoch, indices) of a shuffled epoch of whole batches; `go_to` it first.

    Every run of world_size * batch_size indices is one global batch, cut into one block a rank:
    the same images whatever the number of ranks that share it. A key's further indices are those
    that follow in the epoch, to stand in for an image that cannot be read.
    """

    def __init__(self, size, batch_size, batches, rank, world_size, seed=0):
        self.size, self.seed, self.rank = size, seed, rank
        self.shape = (batches, world_size, batch_size)
        self.go_to(0)

    def go_to(self, epoch, batch=0):
        """The next iteration is of that epoch, from that batch of the rank on."""
        self.epoch, self.batch = epoch, batch

    def __len__(self):
        """Of a whole epoch."""
        return self.shape[0] * self.shape[2]

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        places = np.arange(np.prod(self.shape)).reshape(self.shape)[self.batch :, self.rank].ravel()
        tries = min(TRIES, self.size)
        for place in places:
            yield self.epoch, tuple(order[(place + np.arange(tries)) % self.size].tolist())


def open_loader(dataset, batch_size, workers, device, update_freq=1, collate_fn=None):
    """The loader of one rank: whole updates of whole batches, shuffled anew every epoch.

    dataset: its `seed` shuffles. Raises InputError where it is too small for one update.
    """
    world_size = get_world_size()
    batches = len(dataset) // (batch_size * world_size)
    if not batches:
        raise InputError(
            f"--batch-size {batch_size} on {world_size} ranks is more than the {len(dataset)} "
            "training images; lower it"
        )
    if batches < update_freq:
        raise InputError(
            f"--update-freq {update_freq} is more than the {batches} batches of an epoch; lower it"
        )
    batches -= batches % update_freq
    sampler = EpochSampler(len(dataset), batch_size, batches, get_rank(), world_size, dataset.seed)
    return EpochLoader(dataset, sampler, batch_size, workers, device, collate_fn)


class EpochLoader:
    def __init__(self, dataset, sampler, batch_size, workers, device, collate_fn):
        self.images, self.batch_size, self.workers = len(dataset), batch_size, workers
        self.augments_on_device = getattr(dataset, "on_device", False)
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # of its workers' seeds: takes none of the run's numbers
        )

    def __len__(self):
        return len(self.loader)

    def start(self, epoch, batch=0):
        self.loader.sampler.go_to(epoch, batch)
        return iter(self.loader)

    def preview(self, number):
        self.loader.sampler.go_to(0)
        keys = [key for key, _ in zip(self.loader.sampler, range(number), strict=False)]
        return self.loader.collate_fn([self.loader.dataset[key] for key in keys])


def empty_batch(size, device):
    """As of LabelledViews, prepared: one image of zeros, to rehearse with."""
    label = torch.zeros(1, dtype=torch.long, device=device)
    return {"image": torch.zeros(1, 3, size, size, device=device), "label": label}
