"""Small real files, flags of small runs, small trainings, and a log that records its lines."""

import hashlib
import io
import json
import math
import tarfile
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

import main
import tests.warm  # noqa: F401
from infra import devices, distributed, logger
from infra.checkpoint_manager import CheckpointManager
from infra.logger import SilentLog
from infra.run import TrainState


def seeded_weights(state_dict):
    """The weights behind reference.json: the seed of each tensor is a hash of its key."""

    def draw(key, value):
        if not value.is_floating_point():
            return value
        if key == "logit_scale":
            return torch.tensor(2.6593)
        seed = int(hashlib.sha256(f"dev:{key}".encode()).hexdigest()[:12], 16)
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        if key.endswith("running_var"):
            return noise.abs() + 0.5
        if value.ndim < 2:
            return 1 + 0.1 * noise if key.endswith("weight") else 0.02 * noise
        return noise * (value.shape[-1] ** -0.5 if value.ndim == 2 else 0.02)

    return {key: draw(key, value) for key, value in state_dict.items()}


# A pointer that git-lfs leaves in the place of a file.
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def seeded_embeddings():
    """The embeddings behind reference.json's losses: 12 rows of 24."""
    generator = torch.Generator().manual_seed(13)
    names = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")
    return {name: torch.randn(12, 24, generator=generator) for name in names}


def seeded_ids():
    """Ids of 12 captions and images, (12, 2), some equal to others of the same and another half."""
    captions = [0, 1, 0, 2, 3, 4, 5, 0, 6, 7, 3, 8]
    images = [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 8, 8]
    return torch.tensor([captions, images]).T


def save_image(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def write_coco(root, images=16):
    """Writes a COCO set of generated pictures, two captions each; returns the captions' path."""
    annotations = []
    for i in range(images):
        save_image(root / f"train2017/{i:012d}.jpg", i)
        texts = (f"picture {i}", f"a photo of thing number {i}")
        annotations += [{"image_id": i, "caption": text} for text in texts]
    metadata = root / "captions.json"
    metadata.write_text(json.dumps({"annotations": annotations}))
    return metadata


def write_tar(path, members, **options):
    """A tar of (name, bytes) in this order; of equal bytes for equal members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def encoded(seed, kind="JPEG", size=(40, 30)):
    """The bytes of a picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_shards(root, lengths):
    """Tars 00000.tar ... of so many samples each, named from 0 on; returns their pattern."""
    first = 0
    for number, length in enumerate(lengths):
        members = [
            member
            for i in range(first, first + length)
            for member in ((f"{i:03d}.jpg", encoded(i)), (f"{i:03d}.txt", f"picture {i}".encode()))
        ]
        write_tar(root / f"{number:05d}.tar", members)
        first += length
    return f"{root}/{{00000..{len(lengths) - 1:05d}}}.tar"


def write_folders(root, classes=10, each=3):
    for c in range(classes):
        for i in range(each):
            save_image(root / f"{c}_class" / f"{i}.png", 100 * c + i)


def train_flags(tiny, output_dir, *extra, model="SLIP_NANO8", epochs=1, val="digits"):
    """Flags of a small training run, for main.py's parser or command line."""
    flags = f"--dataset coco --root {tiny} --metadata {tiny}/captions.json --model {model} "
    flags += f"--catalog {tiny}/catalog.json --val-dataset {val} --output-dir {output_dir} "
    flags += f"--epochs {epochs} --batch-size 4 --ssl-mlp-dim 32 --ssl-emb-dim 16 --workers 0 "
    flags += "--print-freq 1 --device cpu --lr 1e-3"
    return [*flags.split(), *map(str, extra)]


def train(tiny, output_dir, *extra, **options):
    """Runs main.py in this process; returns its folder."""
    flags = train_flags(tiny, output_dir, *extra, **options)
    main.main(main.get_args_parser().parse_args(flags))
    return output_dir


def train_in_two_lives(tiny, output_dir, *extra, again=(), **options):
    """The same, interrupted once the first epoch is saved; `again`: further flags of the second."""
    save = CheckpointManager.save

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointManager, "save", save_and_stop)
        train(tiny, output_dir, *extra, **options)
    return train(tiny, output_dir, *extra, *again, **options)


def without_folder(flags):
    """Flags without --output-dir, for run_with_submitit.py, which chooses the folder."""
    at = flags.index("--output-dir")
    return flags[:at] + flags[at + 2 :]


class Said(SilentLog):
    """A log that records its lines."""

    def __init__(self):
        self.lines = []

    def info(self, text):
        self.lines.append(text)


class BareRun:
    """A run without a folder: its state and log; it saves nothing."""

    def __init__(self, log=None, **state):
        self.state, self.log = TrainState(**state), log or SilentLog()

    def fetch(self, wait):
        return wait()

    def obey(self, before_save, is_whole=True):
        pass


class InOrder:
    """A loader of the rows of a set in their order."""

    def __init__(self, rows, batch_size, collate=default_collate):
        self.rows, self.batch_size, self.collate = rows, batch_size, collate

    def __len__(self):
        return math.ceil(len(self.rows) / self.batch_size)

    def start(self, epoch, batch=0):
        for first in range(batch * self.batch_size, len(self.rows), self.batch_size):
            last = min(first + self.batch_size, len(self.rows))
            yield self.collate([self.rows[i] for i in range(first, last)])


def exact_training(name, k, exact=True, seed=0, flags=()):
    """A small training in float64 with a learning rate too small to change the weights."""
    torch.manual_seed(seed)
    args = main.get_args_parser().parse_args(
        f"--model {name} --ssl-mlp-dim 32 --ssl-emb-dim 16 --update-freq {k} --lr 1e-12 "
        f"--lr-end 0 --wd 0 --epochs 1 --warmup-epochs 0 --gather-with-grad "
        f"--accum {'exact' if exact else 'plain'}".split()
        + list(flags)
    )
    model, _ = main.create_model(args)
    t = main.create_training(
        model.double(), devices.Precision("fp32", torch.device("cpu")), 1, args
    )
    t.prefetcher.prepare = lambda batch: batch
    return t


def views_of(model, rows, k, with_ids=False):
    """This rank's share of `rows` random samples, as k micro-batches; many ids are equal."""
    generator = torch.Generator().manual_seed(1)
    size, world_size = (rows, 3, model.image_size, model.image_size), distributed.get_world_size()
    views = {v: torch.randn(size, generator=generator, dtype=torch.float64) for v in model.views}
    if "text" in views:
        views["text"] = torch.randint(1, 400, (rows, 16), generator=generator)
    if with_ids:
        views["ids"] = torch.randint(0, rows, (rows, 2), generator=generator)
    mine = {v: x.chunk(world_size)[distributed.get_rank()].chunk(k) for v, x in views.items()}
    return [{v: x[i] for v, x in mine.items()} for i in range(k)]


def rows(folder):
    """The rows of a run's log."""
    return logger.read_log(folder / "log.txt")


def step_losses(folder):
    """The loss of every update (float32) in TensorBoard's files, one of each life of the run.

    TensorBoard orders files by their names, which tell no two lives of the same second apart.
    """
    losses = {}
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.session_log.status == SessionLog.START:  # these updates run again
                losses = {step: loss for step, loss in losses.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "train/loss":
                    losses[event.step] = value.simple_value
    assert list(losses) == sorted(losses)
    return list(losses.values())


def weights(folder):
    """The latest checkpoint of a run, as plain data."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal(a, b):
    """Equal to the last bit, in nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


class PeakMemory(TorchDispatchMode):
    """Counts bytes of CPU tensors made within it: `now` those alive, `peak` the most at once."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.live:
                storage = tensor.untyped_storage()
                self.live.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def forget(self, key, size):
        self.live.discard(key)
        self.now -= size
