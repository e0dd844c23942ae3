"""The script: its folder, its README, and bad input."""

import errno
import json
import subprocess
import sys

import pytest
import timm
import torch
from test_formats import open_by_open_clip

import export
import tests.warm  # noqa: F401
from infra.distributed import run_script
from models import create_model
from utils import InputError


def save_checkpoint(path, name="SLIP_NANO8", **args):
    torch.manual_seed(0)
    model = create_model(name, 8, 8).eval()
    args = {"model": name, "ssl_mlp_dim": 8, "ssl_emb_dim": 8} | args
    form = model.preprocessing.to_dict()
    torch.save({"state_dict": model.state_dict(), "args": args, "preprocessing": form}, path)
    return model


def call(checkpoint, kind, output):
    flags = ["--resume", checkpoint, "--format", kind, "--output", output]
    export.main(export.get_args_parser().parse_args(list(map(str, flags))))


@pytest.mark.parametrize("kind", ["open_clip", "huggingface"])
def test_a_model_without_text_is_refused(kind, tmp_path):
    save_checkpoint(tmp_path / "c.pt", "SIMCLR_NANO8")
    with pytest.raises(InputError, match="SIMCLR_NANO8 has no text tower.*choose timm or onnx$"):
        call(tmp_path / "c.pt", kind, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_folder_that_moved_opens_after_the_readmes_command(tmp_path):
    old, new = tmp_path / "old", tmp_path / "a new place"
    model = save_checkpoint(tmp_path / "c.pt")
    call(tmp_path / "c.pt", "open_clip", old)
    old.rename(new)
    with pytest.raises((FileNotFoundError, RuntimeError)):
        open_by_open_clip(new)
    command = (new / "README.md").read_text().split("    python -c ")[1].split("\n\n")[0]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=new)
    peer, _, _ = open_by_open_clip(new)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        assert torch.allclose(peer.encode_image(x), model.encode_image(x), rtol=0, atol=1e-5)


def test_the_readme_says_what_the_model_is_and_its_scores(tmp_path, capsys):
    save_checkpoint(tmp_path / "c.pt", dataset="yfcc15m")
    accuracy = {"accuracy": 12.345, "checkpoint": str(tmp_path / "c.pt")}
    other = {"accuracy": 99.0, "checkpoint": "another.pt"}
    for name, rows in {
        "results": {"digits": accuracy, "elsewhere": other},
        "linear": {"digits": accuracy},
        "retrieval": {
            "coco": {**dict.fromkeys(export.report.RECALLS, 5.0), "checkpoint": "c.pt"},
            "elsewhere": {**dict.fromkeys(export.report.RECALLS, 6.0), "checkpoint": "another.pt"},
        },
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    call(tmp_path / "c.pt", "timm", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    for part in (
        "# SLIP_NANO8",
        "image tower NANO8 (timm's vit_tiny_patch16_224)",
        "Training data: yfcc15m.",
        "to 32 pixels, bilinear, centre crop; mean 0.485",
        "The SimCLR head is left out",
        'timm.create_model("local-dir:out", pretrained=True)',
        "| digits | zero-shot | 12.35 |\n| digits | linear | 12.35 |",
        "| coco | image to text, recall at 1, 5, 10 | 5.00 5.00 5.00 |",
    ):
        assert part in text
    assert "elsewhere" not in text
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: SLIP_NANO8 for timm\n")
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o077


def test_an_export_takes_the_place_of_an_older_one_alone(tmp_path):
    out = tmp_path / "out"
    save_checkpoint(tmp_path / "c.pt")
    out.mkdir()
    call(tmp_path / "c.pt", "timm", out)
    (out / "old").touch()
    call(tmp_path / "c.pt", "open_clip", out)
    assert "old" not in [path.name for path in out.iterdir()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "out"]
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"output .*out holds .* and is no export; choose another"):
        call(tmp_path / "absent.pt", "timm", out)  # it is said before the model is read
    with pytest.raises(InputError, match="is a file; choose a folder"):
        call(tmp_path / "c.pt", "timm", tmp_path / "c.pt")


def test_a_link_stays_and_the_users_own_folder_too(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pt")
    (tmp_path / "link").symlink_to(tmp_path / "other disk")
    for _ in range(2):  # the folder is absent, then an export
        call(tmp_path / "c.pt", "timm", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other disk/README.md").exists()
    monkeypatch.chdir(tmp_path / "link")
    for output in (".", "../other disk/"):
        with pytest.raises(InputError, match="is the folder that you are in; choose a new one"):
            call(tmp_path / "c.pt", "timm", output)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_export_that_ends_early_leaves_what_was_there(error, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "c.pt")
    call(tmp_path / "c.pt", "timm", tmp_path / "out")

    def write_part(source, folder, home):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setitem(export.FORMATS, "timm", export.Format(write_part, ""))
    for output in ("out", "new"):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda output=output: call(tmp_path / "c.pt", "timm", tmp_path / output))
        assert ended.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "out"]
    assert (tmp_path / "out/model.safetensors").exists()
    line = capsys.readouterr().err.splitlines()[0]
    assert line in ("interrupted", "error: No space left; free space, or choose another folder")


def test_the_older_export_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with export.new_folder(out) as folder:
        (folder / "README.md").write_text(export.MARK)
    rename = type(out).rename

    def fail(self, target):
        if self.suffix == ".tmp":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fail)
    with pytest.raises(OSError), export.new_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and list(out.iterdir())


def test_files_that_came_in_the_meantime_stay(tmp_path):
    path, match = tmp_path / "out", "holds mine and is no export"
    with pytest.raises(InputError, match=match), export.new_folder(path):
        path.mkdir()
        (path / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_image_tower_alone_is_written_for_timm(tmp_path):
    vit = timm.create_model("test_vit", num_classes=0).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    flags = ["--resume", str(tmp_path / "x.pth"), "--arch", "test_vit", "--format", "timm"]
    export.main(export.get_args_parser().parse_args([*flags, "--output", str(tmp_path / "out")]))
    found = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(found(x), vit(x))
    assert "# test_vit\n\nTrained by others" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(InputError, match="test_vit has no text tower, which open_clip needs"):
        flags[-1] = "open_clip"
        export.main(export.get_args_parser().parse_args([*flags, "--output", str(tmp_path / "b")]))


def test_unknown_flags_and_formats_are_one_line(tmp_path):
    parse = export.get_args_parser().parse_args
    with pytest.raises(InputError, match="invalid choice: 'coreml'.*open_clip.*onnx"):
        parse("--resume c.pt --format coreml --output out".split())
    with pytest.raises(InputError, match="absent"):
        call(tmp_path / "absent.pt", "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "c.pt")
    with pytest.raises(InputError, match="folder /proc/x.*: No such file or directory; choose"):
        call(tmp_path / "c.pt", "timm", "/proc/x")
