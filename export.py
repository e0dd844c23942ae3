"""Writes a checkpoint's model into a folder that open_clip, timm, transformers or ONNX can open.

    python export.py --resume runs/slip/checkpoint.pt --format open_clip --output slip_open_clip
    python export.py --resume runs/slip/checkpoint.pt --format onnx --output slip_onnx

The folder's README.md says how to open it. The SimCLR head is left out.
"""

import os
import secrets
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import report
import utils
from formats import Source, write_huggingface, write_open_clip, write_timm
from infra import distributed
from models import CLIP
from onnx_files import write_onnx
from pretrained import add_arch_flag, open_weights
from utils import InputError
from weight_names import tower_of

MARK = "<!-- by export.py -->"  # the README of a folder that may be replaced begins with it


@dataclass(frozen=True)
class Format:
    """A writer, and the Python that opens the folder."""

    write: callable
    opening: str


FORMATS = {
    "open_clip": Format(
        write_open_clip,
        """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
model.eval()""",
    ),
    "timm": Format(
        write_timm,
        """import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    ),
    "huggingface": Format(
        write_huggingface,
        """from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("FOLDER").eval()
processor = CLIPProcessor.from_pretrained("FOLDER")""",
    ),
    "onnx": Format(
        write_onnx,
        """import onnxruntime
image = onnxruntime.InferenceSession("FOLDER/image.onnx")
text = onnxruntime.InferenceSession("FOLDER/text.onnx")  # if the method reads text
(embeddings,) = image.run(None, {"image": images})  # (B, 3, S, S) float32, normalised
(embeddings,) = text.run(None, {"text": ids})  # (B, L) int64, by tokenizer.py""",
    ),
}


def get_args_parser():
    parser = utils.ArgumentParser("export.py", "A checkpoint's model in the format of another tool")
    add = parser.add_argument
    add("--resume", required=True, help="weights: a file, NAME:TAG, see docs/weights.md")
    add_arch_flag(add)
    add("--ema", action="store_true", help="the average of the weights, of a run with --ema-decay")
    add("--format", required=True, choices=FORMATS, help="the tool that is to open the folder")
    add("--output", required=True, help="folder to write; an older export there is replaced")
    return parser


# ---------------------------------------------------------------------------------------------
# The folder


@contextmanager
def new_folder(path):
    """Yields a folder beside `path` that takes its place at the end, unless an error comes first.

    Raises InputError for a path that holds anything but an export.
    """
    check_free(path)
    utils.make_folder(path.parent)
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    old = new.with_suffix(".old")
    try:
        utils.make_folder(new)
        yield new
        check_free(path)  # what came in the meantime is not ours to remove
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def check_free(path):
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"output {path} is a file; choose a folder")
    if path.samefile(os.curdir):  # which a new folder would take from below the user's shell
        raise InputError(f"output {path} is the folder that you are in; choose a new one")
    names, readme = os.listdir(path), path / "README.md"
    is_export = readme.is_file() and readme.read_bytes().startswith(MARK.encode())
    if names and not is_export:
        raise InputError(f"output {path} holds {names[0]} and is no export; choose another folder")


# ---------------------------------------------------------------------------------------------
# The README


def read_scores(source):
    """[(set, evaluation, "12.34")] of a file of weights, from the result files beside it."""
    if not os.path.isfile(source):  # NAME:TAG or a folder
        return []
    path = Path(source)
    recalls = report.read_scores(path.parent / "retrieval.json", report.RECALLS)
    results = {**report.read_evaluations(path.parent), "retrieval": recalls}
    return [
        (name, *score)
        for kind, rows in results.items()
        for name, row in rows.items()
        if Path(str(row.get("checkpoint", path))).name == path.name
        for score in scores_of(kind, row)
    ]


def scores_of(kind, row):
    if "accuracy" in row:
        return [(kind, f"{row['accuracy']:.2f}")]
    return [
        (
            f"{way.replace('_', ' ')}, recall at 1, 5, 10",
            " ".join(f"{row[f'{way}_recall{k}']:.2f}" for k in (1, 5, 10)),
        )
        for way in ("image_to_text", "text_to_image")
    ]


def describe(source, data, args, notes):
    """The README: what the model is, how to open it, its scores.

    Args:
        source: the model.
        data: name of its training data, or None.
        args: parsed flags.
        notes: the writer's.
    """
    form, tower = source.form, tower_of(source.name)
    method = source.name.removesuffix(tower).rstrip("_")
    mean, std = (", ".join(map(str, values)) for values in (form.mean, form.std))
    lines = [
        MARK,
        f"# {source.name}",
        "",
        f"Trained by {method or 'others'} with the image tower {tower} (timm's "
        f"{source.tower.timm_name}).",
        *([f"Training data: {data}."] if data else []),
        "",
        f"- Images: shorter side to {form.image_size} pixels, {form.interpolation}, centre crop; "
        f"mean {mean}, deviation {std}",
    ]
    if isinstance(source.model, CLIP):
        lines.append(f"- Texts: {describe_text(source.model)}")
    if method in ("SIMCLR", "SLIP"):
        lines.append("- The SimCLR head is left out")
    if args.ema:
        lines.append("- The weights are averages over the training's updates")
    folder = Path(args.output).name
    code = FORMATS[args.format].opening.replace("FOLDER", folder)
    lines += ["", "```python", f"# from the folder above {folder}", code, "```"]
    lines += [line for note in notes for line in ("", note)]
    if not args.ema and (scores := read_scores(args.resume)):  # those are of the other weights
        lines += ["", "| set | evaluation | % |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in scores]
    return "\n".join(lines) + "\n"


def describe_text(model):
    form = model.preprocessing
    if model.text:
        return f"the tokenizer of {model.text.source.name}, {form.context_length} tokens, padded"
    return f"CLIP's tokenizer, {form.context_length} tokens; activation {form.activation}"


def main(args):
    output = Path(os.path.realpath(args.output))
    check_free(output)  # before the model is loaded

    found = open_weights(args.resume, args.arch, args.ema)
    source = Source(found.build(), found.name, found.tower)

    with new_folder(output) as folder:
        notes = FORMATS[args.format].write(source, folder, output)
        readme = describe(source, getattr(found.args, "dataset", None), args, notes)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    print("\n".join([f"{output}: {source.name} for {args.format}", *notes]))


if __name__ == "__main__":
    distributed.run_script(lambda: main(get_args_parser().parse_args()))
