"""The archived code's way to train, to read data and to build classifiers, on today's libraries.

The benchmarks compare this repository with it. Shapes: B batch, L tokens, W width of a tower.
"""

import random
import zipfile
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms as tv

import losses
import optimization
from decoding import decode_image
from preprocessing import IMAGENET_MEAN, IMAGENET_STD
from towers import CausalSelfAttention
from utils import InputError

# Flags of main.py. The archived code augments images and converts them to floats on the CPU.
FLAGS = ("--no-compile", "--augment", "cpu", "--accum", "plain", "--clip-grad-norm", "0")

# ---------------------------------------------------------------------------------------------
# Training


def masked_attention(attention, x):
    """towers.CausalSelfAttention, (B, L, W) -> (B, L, W), with a tensor as its mask."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (B, L, 3W)
    qkv = qkv.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    mask = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device, dtype=qkv.dtype).triu(1)
    x = F.scaled_dot_product_attention(*qkv, attn_mask=mask)  # (B, heads, L, W/heads)
    return attention.out_proj(x.transpose(1, 2).flatten(2))


def separate_towers(model, text=None, **images):
    """The features of all views, with one pass of the image tower per view."""
    features = {view: model.visual(x) for view, x in images.items()}
    return features if text is None else {**features, "text": model.text_tower.forward_text(text)}


def whole_contrast(contrast, queries, *arguments, **options):
    """contrast.InfoNCE with all rows at once, kept for backward."""
    total, hits, found = contrast.rows(queries, *arguments, **options)
    return total / len(queries), 100 * hits / len(queries), 100 * found / len(queries)


def as_archived(training, args):
    """Replaces the parts of a training that are faster here than in the archived code."""
    if args.clip_loss != "softmax" or args.duplicates != "keep":
        raise InputError("the archived code has no --clip-loss and no --duplicates; omit --paper")
    training.model.forward_features = partial(separate_towers, training.model)
    for module in [*training.model.modules(), *training.criterion.modules()]:
        if isinstance(module, CausalSelfAttention):
            module.forward = partial(masked_attention, module)
        elif isinstance(module, losses.InfoNCE):
            module.forward = partial(whole_contrast, module)
    training.optimizer = torch.optim.AdamW(  # not fused
        optimization.param_groups(training.model, args.wd), args.lr, args.betas, args.eps
    )


# ---------------------------------------------------------------------------------------------
# Reading data


class Blur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def image_transforms(size):
    """{view: PIL image -> normalised (3, size, size) float tensor}"""
    end = [tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    jitter = tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    steps = [jitter, tv.RandomGrayscale(0.2), tv.RandomApply([Blur()], 0.5)]
    crop = tv.RandomResizedCrop(size, (0.08, 1.0))
    augment = tv.Compose([crop, *steps, tv.RandomHorizontalFlip(), *end])
    image = tv.Compose([tv.RandomResizedCrop(size, (0.5, 1.0)), *end])
    return {"image": image, "aug1": augment, "aug2": augment}


class ArchivedDataset(Dataset):
    """Samples {view: tensor}: PIL images, decoded once, and captions of 77 tokens."""

    def __init__(self, pairs, root, views, tokenizer, size):
        transforms = image_transforms(size)
        self.transforms = {view: transforms[view] for view in views if view != "text"}
        self.pairs, self.root = pairs, root
        self.tokenizer = tokenizer if "text" in views else None

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, texts = self.pairs[index]
        with open(self.root / path, "rb") as file:
            image = Image.open(file).convert("RGB")
        sample = {view: transform(image) for view, transform in self.transforms.items()}
        return sample | {"text": self.tokenizer(random.choice(texts))} if self.tokenizer else sample


class ArchivedLoader:
    """Shuffled epochs of whole batches, by PyTorch's own sampler.

    Offers start(epoch), as the loader of datasets.open_loader does.
    """

    def __init__(self, dataset, batch_size, workers, device, seed=0, collate_fn=None):
        self.sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=seed)
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=self.sampler,
            collate_fn=collate_fn,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            drop_last=True,
        )

    def start(self, epoch):
        """An iterator over the batches of an epoch."""
        self.sampler.set_epoch(epoch)
        return iter(self.loader)


def read_archived(root, names):
    """Decodes images in zips, and opens the zip, which parses its directory, for every image."""
    for name in names:
        archive, _, member = name.partition(".zip/")
        with zipfile.ZipFile(root / f"{archive}.zip") as file:
            decode_image(file.read(member), name)


# ---------------------------------------------------------------------------------------------
# Zero-shot classifiers


@torch.no_grad()
def build_one_by_one(model, classes, templates):
    """(C, D) unit rows, from the prompts of one class at a time, of 77 tokens each."""
    rows = []
    for name in classes:
        tokens = model.tokenizer([template.format(name) for template in templates])
        embeds = F.normalize(model.encode_text(tokens), dim=-1)
        rows.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(rows)
