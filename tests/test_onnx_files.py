"""ONNX files of the encoders, opened by onnxruntime."""

import sys

import pytest
import torch
from test_export import call, save_checkpoint
from test_formats import source_of

import onnx_files
from utils import InputError


def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {path.stem: x.numpy()})[0])


def test_onnxruntime_opens_an_export(tmp_path, monkeypatch, capsys):
    model = save_checkpoint(tmp_path / "c.pt")
    monkeypatch.setattr(onnx_files, "LIMIT", 0)  # weights in files of their own
    call(tmp_path / "c.pt", "onnx", tmp_path / "out")
    x, texts = torch.randn(5, 3, 32, 32), model.tokenizer(["fog", "a dog", "two", "three"])
    with torch.no_grad():
        for name, inputs in {"image": x, "text": texts}.items():
            expected = getattr(model, f"encode_{name}")(inputs)
            embeddings = run_onnx(tmp_path / f"out/{name}.onnx", inputs)
            assert torch.allclose(embeddings, expected, rtol=0, atol=1e-4)
    assert {f"{name}.onnx.data" for name in ("image", "text")} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert "By onnxruntime text.onnx gives the model's embeddings to" in capsys.readouterr().out


def test_onnx_files_are_compared_with_the_model(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pt", "SIMCLR_NANO8")
    call(tmp_path / "c.pt", "onnx", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "image.onnx"]
    x, encoder = torch.randn(3, 3, 32, 32), lambda x: torch.zeros(3, 64) + x.mean()
    with pytest.raises(InputError, match="image.onnx differs from the model by"):
        onnx_files.check_onnx(tmp_path / "out/image.onnx", "image", x, encoder)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    note = onnx_files.check_onnx(tmp_path / "out/image.onnx", "image", x, encoder)
    assert note == "image.onnx was not checked, as onnxruntime was not installed."


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    save_checkpoint(tmp_path / "c.pt")
    with pytest.raises(InputError, match=f"needs the package {package}; pip install {package}$"):
        call(tmp_path / "c.pt", "onnx", tmp_path / "out")


def test_what_onnx_cannot_express_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.onnx.errors.OnnxExporterError("no operator for that\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match="image encoder of SIMCLR_vits: no operator for that$"):
        onnx_files.write_onnx(source_of("SIMCLR_vits"), tmp_path, tmp_path)
