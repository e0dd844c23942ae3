"""Prepares data: `python make_dataset.py digits` writes the demo's set.

digits: scikit-learn's 1,797 handwritten digits (UCI ML repository, 8 x 8 pixels) as a caption set
in COCO's layout and as an ImageFolder, a quarter of them held out for evaluation.
"""

import os
import shutil

import numpy as np
from PIL import Image

import utils

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{}", "the {}", "digit {}", "number {}", "a handwritten {}")
SIZE = 32  # pixels


def save_digit(pixels, path):
    """pixels: (8, 8), 0 to 16."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path, quality=95)


def make_digits(root):
    """Writes train2017/, annotations/captions_train2017.json, train/ and test/ below root."""
    from sklearn.datasets import load_digits

    if os.path.exists(root):
        print(f"{root} is there already")
        return
    digits, part = load_digits(), f"{root}.part"
    shutil.rmtree(part, ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(digits.images))
    test, train = np.split(order, [len(order) // 4])

    for split, indices in (("train", train), ("test", test)):
        for i in indices:
            folder = f"{digits.target[i]}_{NAMES[digits.target[i]]}"
            save_digit(digits.images[i], f"{part}/{split}/{folder}/{i:04d}.png")
    annotations = []
    for i in train:
        save_digit(digits.images[i], f"{part}/train2017/{i:012d}.jpg")
        texts = [template.format(NAMES[digits.target[i]]) for template in CAPTIONS]
        annotations += [{"image_id": int(i), "caption": text} for text in texts]
    os.makedirs(f"{part}/annotations")
    utils.write_json(f"{part}/annotations/captions_train2017.json", {"annotations": annotations})

    os.replace(part, root)
    print(f"{root}: {len(train)} images with {len(annotations)} captions, {len(test)} held out")


def get_args_parser():
    parser = utils.ArgumentParser("make_dataset.py", "Prepares data")
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", description="handwritten digits for the demo")
    digits.add_argument("--root", default="data/digits", help="folder to write")
    digits.set_defaults(make=lambda args: make_digits(args.root))
    return parser


def main(args):
    args.make(args)


if __name__ == "__main__":
    utils.run(lambda: main(get_args_parser().parse_args()))
