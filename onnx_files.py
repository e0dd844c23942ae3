"""A model's encoders as ONNX files, written by PyTorch's exporter and checked by onnxruntime."""

import importlib

import numpy as np
import torch
from torch import nn

from infra.untrusted import first_line
from model_configs import TEXT_FOLDER
from models import CLIP
from utils import InputError

LIMIT = 2**30  # bytes of weights in the model's own file, which may not exceed 2**31


class Encoder(nn.Module):
    """One of a model's two encoders, as a module."""

    def __init__(self, model, encode):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, x):
        return getattr(self.model, self.encode)(x)


def write_onnx(source, folder, home):
    for package in ("onnx", "onnxscript"):
        require_package(package)
    model, size = source.model, source.form.image_size
    inputs = {"image": torch.randn(3, 3, size, size)}
    if isinstance(model, CLIP):
        inputs["text"] = model.tokenizer(["a photo", "two", "the third of the texts"])
    notes = []
    for name, x in inputs.items():
        encoder, path = Encoder(model, f"encode_{name}").eval(), folder / f"{name}.onnx"
        is_large = sum(param.nbytes for param in model.parameters()) > LIMIT
        try:
            torch.onnx.export(
                encoder,
                (x[:2],),
                path,
                input_names=[name],
                output_names=[f"{name}_embeddings"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=is_large,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise InputError(
                f"ONNX cannot express the {name} encoder of {source.name}: {first_line(error)}"
            ) from error
        notes.append(check_onnx(path, name, x, encoder))
    if getattr(model, "text", None):
        model.text.source.write(folder / TEXT_FOLDER)
        notes.append(f"The tokenizer is in the folder {TEXT_FOLDER}, for transformers to open.")
    return notes


def check_onnx(path, name, x, encoder):
    """Compares embeddings by onnxruntime, at another batch size than the example's; a note."""
    try:
        import onnxruntime
    except ImportError:
        return f"{path.name} was not checked, as onnxruntime was not installed."
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {name: x.numpy()})
    with torch.no_grad():
        ours = encoder(x).numpy()
    error = np.abs(theirs - ours).max() / np.abs(ours).max()
    if not error < 1e-3:
        raise InputError(
            f"{path.name} differs from the model by {error:.1g}; update onnx and torch"
        )
    return f"By onnxruntime {path.name} gives the model's embeddings to {error:.1g} of the largest."


def require_package(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this format needs the package {name}; pip install {name}") from error
