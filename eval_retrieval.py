"""Image-text retrieval on COCO, Flickr30k and the like: recall at 1, 5, 10, mean and median rank.

    python eval_retrieval.py --resume checkpoint.pt --captions dataset_coco.json --root COCO
    python eval_retrieval.py --resume checkpoint.pt --captions captions_val2017.json --root val2017

Reads Karpathy's split files and COCO's caption files. As usual in the field an image has its first
five captions; it is found by its text if it is among the k best images, and its text is found if
any of the five is among the k best texts. Rank 1 is the best.
Shapes: n images, m captions, D joint embedding.
"""

import math
import os
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import catalog
import utils
from captions import SOURCES, coco_file, coco_id, load_captions
from evaluation import Evaluation, check_finite, check_results, predict, split_rows
from infra import devices, distributed
from infra.archives import has_file
from infra.rows import Files, kept_rows, only_text, plain_text
from infra.untrusted import check_inside
from pretrained import load_model
from transforms import CenterCrop
from utils import InputError, positive_int

CHUNK = 1024  # queries that are compared with everything at once


def get_args_parser():
    parser = utils.ArgumentParser("eval_retrieval.py", "Image-text retrieval of a checkpoint")
    add = parser.add_argument
    add("--resume", required=True, help="weights: a file, NAME:TAG, see docs/weights.md")
    text = "Karpathy's split file or a COCO captions file (JSON); .arrow, or as --dataset says"
    add("--captions", required=True, help=text)
    add("--dataset", help=f"kind of another caption set: one of {', '.join(SOURCES)}")
    add("--csv-img-key", default="filepath", help="image column of --dataset csv")
    add("--csv-caption-key", default="title", help="caption column of --dataset csv")
    add("--json-caption-key", default=[], nargs="+", help="fields of .json of --dataset webdataset")
    add("--root", required=True, help="folder of the images")
    catalog.add_outside_flag(add)
    add("--archived-pixels", action="store_true", help="ignore EXIF's turns and transparency")
    add("--split", default="test", help="of Karpathy's file; a COCO file is taken whole")
    add("--captions-per-image", default=5, type=positive_int, help="the first so many of each")
    add("--name", help="of the set in retrieval.json; by default the captions file's")
    add("--output-dir", default="./", help="folder of retrieval.json")
    add("--image-size", type=positive_int, help="pixels; by default the model's")
    add("--batch-size", default=256, type=positive_int, help="images per rank and step")
    devices.add_system_flags(parser)
    return parser


# ---------------------------------------------------------------------------------------------
# Caption files


def read_karpathy(table, split, kept):
    """[(path below the root, captions)] of a split; "train" takes in "restval" as well."""

    def pick(row):
        path = os.path.join(row.get("filepath") or "", plain_text(row["filename"], "an image path"))
        texts = [s.get("raw") if isinstance(s, dict) else s for s in row.get("sentences") or []]
        return row["split"], path, texts

    rows = list(kept(table["images"], pick))
    splits = {split for split, _, _ in rows}
    if split not in splits:
        raise InputError(f"split {split!r} is absent; choose from {', '.join(sorted(splits))}")
    wanted = {"train", "restval"} if split == "train" else {split}
    return [(path, list(kept(texts, only_text))) for own, path, texts in rows if own in wanted]


def read_coco(table, split, kept):
    """An image without a file name is named after its number, as COCO's are."""

    def image(row):
        name = row.get("file_name")
        return coco_id(row["id"]), name if isinstance(name, str) else None

    def annotation(row):
        number = coco_id(row["image_id"])
        if number not in paths and "images" in table:
            raise InputError(f"a caption names image {number}, which is not listed")
        return number, coco_file(number, paths.get(number)), only_text(row.get("caption"))

    paths = dict(kept(table.get("images", []), image))
    texts = {number: [] for number in paths}
    for number, path, text in kept(table["annotations"], annotation):
        paths[number] = path
        texts.setdefault(number, []).append(text)
    return [(paths[number], own) for number, own in texts.items()]


def read_captions(path, split, per_image):
    """The images of a split that have captions, without the captions that are no text.

    Args:
        path: of the captions file.
        split: of Karpathy's file.
        per_image: the first so many captions of an image are taken.

    Returns ([(image path, captions)], Counter of the reasons why others were left out). Raises
    InputError for another file.
    """
    table, left_out, files = utils.read_json(path, "captions"), Counter(), Files([path])
    reader = read_coco if isinstance(table, dict) and "annotations" in table else read_karpathy
    kept = partial(kept_rows, files, dropped=left_out)
    try:
        images = reader(table, split, kept)
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is neither Karpathy's nor COCO's: {error!r}; see --help"
        ) from error
    rows = [(image, texts[:per_image]) for image, texts in images if texts]
    if not rows:
        raise InputError(f"{path} has no image with captions in split {split!r}")
    left_out = Counter({f"rows {reason}": number for reason, number in left_out.items()})
    left_out["images without any caption"] = len(images) - len(rows)
    return rows, +left_out


def first_texts(captions, number):
    """The first so many captions of an image that are not blank."""
    return [text for text in captions if text.strip()][:number]


def read_images(args):
    """read_captions for the flags: of a caption set of main.py's, or of a captions file."""
    if not args.dataset and not args.captions.endswith(".arrow"):
        return read_captions(args.captions, args.split, args.captions_per_image)
    columns = (args.csv_img_key, args.csv_caption_key, *args.json_caption_key)
    pairs = distributed.rank_zero_first(
        lambda: load_captions(args.dataset or "csv", args.captions, columns)
    )
    rows = map(pairs.__getitem__, range(len(pairs)))
    return [(path, first_texts(texts, args.captions_per_image)) for path, texts in rows], {}


class Images(Dataset):
    """Files as `view` makes them of PIL's, labelled by their number. All must be below root."""

    def __init__(self, root, paths, view, allow_outside=False, archived=False):
        for path in paths:
            check_inside(root, path, "image", allow_outside)
        absent = [path for path in paths if not has_file(root, path)]
        if absent:
            raise InputError(
                f"{len(absent)} of {len(paths)} captioned images are absent below --root {root}, "
                f"the first {absent[0]}; check --root"
            )
        self.root, self.paths, self.view = root, paths, view
        self.archived = archived

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = os.path.join(self.root, self.paths[index])
        return self.view(catalog.load_image(path, self.archived)), index


# ---------------------------------------------------------------------------------------------
# Recall


def ranks_of_matches(queries, keys, groups, query_groups):
    """How many keys come before each query's best match when sorted by similarity, (Q,).

    Equally similar keys keep their order. Chunks of queries keep memory linear.

    Args:
        queries: (Q, D) unit rows.
        keys: (K, D) unit rows.
        groups: (K,) numbers; a query matches the keys that have its number.
        query_groups: (Q,) the numbers of the queries.
    """
    ranks, places = [], torch.arange(len(keys), device=keys.device)
    for part, mine in zip(queries.split(CHUNK), query_groups.split(CHUNK), strict=True):
        scores = part @ keys.T
        matches = scores.masked_fill(mine[:, None] != groups, -torch.inf)
        best = matches.amax(1, keepdim=True)
        first = (matches == best).int().argmax(1, keepdim=True)
        ranks.append(((scores > best) | ((scores == best) & (places < first))).sum(1))
    return torch.cat(ranks)


def retrieval_scores(images, texts, owners):
    """Recall in percent, mean and median rank (1: the first) in both directions.

    Args:
        images: (n, D) unit rows.
        texts: (m, D) unit rows.
        owners: (m,) the image of each text.
    """
    numbers = torch.arange(len(images), device=images.device)
    directions = {
        "image_to_text": ranks_of_matches(images, texts, owners, numbers),
        "text_to_image": ranks_of_matches(texts, images, numbers, owners),
    }
    scores = {}
    for name, ranks in directions.items():
        ranks = ranks.cpu().numpy() + 1
        scores |= {f"{name}_recall{k}": 100 * float((ranks <= k).mean()) for k in (1, 5, 10)}
        scores[f"{name}_mean_rank"] = float(ranks.mean())
        scores[f"{name}_median_rank"] = float(np.median(ranks))
    return scores


COLUMNS = "recall at 1, 5, 10, mean and median rank"


def describe_scores(scores):
    """A line for each direction of retrieval_scores, with the numbers of COLUMNS."""
    keys = ("recall1", "recall5", "recall10", "mean_rank", "median_rank")
    for way in ("image_to_text", "text_to_image"):
        numbers = "  ".join(f"{scores[f'{way}_{key}']:6.2f}" for key in keys)
        yield f"{way.replace('_', ' ')}  {numbers}"


@torch.no_grad()
def embed_texts(model, texts, evaluation, batch_size=256):
    """(m, D) unit rows in float64, each as evaluation.predict keeps images; ranks share them."""
    device, tokenizer = evaluation.precision.device, model.tokenizer
    mine = split_rows(len(texts))[distributed.get_rank()]
    rows = torch.zeros(len(texts), model.embed_dim, dtype=torch.float64, device=device)
    for start in range(0, math.ceil(len(texts) / distributed.get_world_size()), batch_size):
        evaluation.poll()
        part = mine[start : start + batch_size]
        if len(part):  # a rank may have a batch less than others
            tokens = tokenizer.trim(tokenizer([texts[i] for i in part])).to(device)
            with evaluation.precision.autocast():
                embeds = F.normalize(model.encode_text(tokens).float(), dim=-1)
            rows[part.to(device)] = embeds.double()
    return check_finite(distributed.all_reduce(rows))


def embed_images(model, dataset, evaluation):
    """(unit rows (n, D) in float64, labels (n,)) of a labelled set, on every rank."""

    def embed(images):
        return F.normalize(model.encode_image(model.normalize(images)).float(), dim=-1)

    rows, labels = predict(embed, model.embed_dim, dataset, evaluation)
    return rows.to(evaluation.precision.device), labels


def main(args):
    device = distributed.init_distributed(args.device, args.dist_url, args.deterministic)

    model, train_args = load_model(args.resume, args.image_size)
    if "text" not in model.views:
        raise InputError(
            f"{args.resume} holds {train_args.model}: it has no text to retrieve by; choose a "
            "checkpoint of CLIP or SLIP"
        )
    model.to(device)
    precision = devices.Precision(args.precision, device)

    rows, left_out = read_images(args)
    paths = [path for path, _ in rows]
    options = args.allow_outside_root, args.archived_pixels
    dataset = Images(args.root, paths, CenterCrop.of(model.preprocessing), *options)
    if left_out and distributed.is_main_process():
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.most_common())
        print(f"{args.captions}: left out: {reasons}", flush=True)
    captions = [text for _, texts in rows for text in texts]
    owners = torch.tensor([i for i, (_, texts) in enumerate(rows) for _ in texts], device=device)

    check_results(args.output_dir, "retrieval")
    evaluation = Evaluation(precision, args.batch_size, args.workers)
    images, _ = embed_images(model, dataset, evaluation)
    texts = embed_texts(model, captions, evaluation)
    result = retrieval_scores(images, texts, owners)
    result |= {"images": len(rows), "captions": len(captions), "checkpoint": args.resume}
    if distributed.is_main_process():
        name = args.name or os.path.splitext(os.path.basename(args.captions))[0]
        utils.make_folder(args.output_dir)
        utils.update_json(os.path.join(args.output_dir, "retrieval.json"), {name: result})
        print(f"{name}: {len(rows)} images, {len(captions)} captions; {COLUMNS}")
        for line in describe_scores(result):
            print(f"  {line}")


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
