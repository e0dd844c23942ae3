"""Fixtures, and the conditions under which tests are skipped.

This file imports little, as every process of pytest-xdist reads it, even the controller, which runs
no test. The rest is in helpers.py.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# The processes of pytest-xdist share the cores, and results are equal to the bit only if the number
# of threads is.
os.environ["OMP_NUM_THREADS"] = "1"
# Nor does each of them need processes of its own to compile in, which import torch anew.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def no_wait_for_the_disk(descriptor):
    """In the place of os.fsync, which waits for all that the tests beside it write: 20 s were seen.

    It helps when the power is cut, which no test does; test_distributed.py sees that it is called.
    """


os.fsync = no_wait_for_the_disk

PEERS = re.compile(r"(import|from) (open_clip|transformers|clip_benchmark|hf_text|onnx)")
HERE = Path(__file__).parent


@functools.cache
def slurm_answers():
    try:
        sinfo = subprocess.run(["sinfo"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return sinfo.returncode == 0


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slurm") and not slurm_answers():
        pytest.skip("needs a Slurm cluster that answers sinfo; tests/slurm_cluster.py starts one")


@functools.cache
def has_peers(path):
    """Whether a file's tests import large libraries of the field, or what imports them."""
    return bool(PEERS.search(path.read_text(encoding="utf-8")))


def pytest_collection_modifyitems(items):
    """Runs the Slurm test, the longest, first: it mostly waits.

    Tests beside peers come next, as neighbours: most of them fall to one process of pytest-xdist,
    and the others need not import these libraries, which takes a core 10 s.
    """
    items.sort(
        key=lambda item: (item.get_closest_marker("slurm") is None, not has_peers(item.path))
    )


def pytest_collection_finish(session):
    """Forks the server of launch.py if the tests use it, before one of them runs PyTorch."""
    if "launch" in sys.modules and session.items:
        sys.modules["launch"].start_server()


@pytest.fixture(scope="session")
def reference():
    """Results of the archived code, on the seeded weights and batches that the tests draw again."""
    return json.loads((HERE / "reference.json").read_text())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a caption set, a labelled set named digits, and a catalog that lists digits."""
    from helpers import write_coco, write_folders

    root = tmp_path_factory.mktemp("tiny")
    write_coco(root)
    write_folders(root / "digits" / "test")
    entry = {"path": "digits", "type": "imagefolder", "train": "train", "test": "test"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry}))
    return root


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """{kind: folder of a tiny text model of Hugging Face}, without dropout."""
    from text_folders import DROPOUT_OFF, write_text_model

    root = tmp_path_factory.mktemp("texts")
    return {
        kind: write_text_model(root / kind, kind, **DROPOUT_OFF) for kind in ("roberta", "bert")
    }


@pytest.fixture(scope="session")
def probed(tiny, tmp_path_factory):
    """A folder with a checkpoint of one epoch and a labelled set of two splits."""
    from helpers import train, write_folders

    root = tmp_path_factory.mktemp("probed")
    train(tiny, root / "run", val="none")
    write_folders(root / "digits/train", each=4)
    write_folders(root / "digits/test", each=3)
    entry = {"path": "digits", "type": "imagefolder"}
    absent = {"path": "digits", "type": "imagefolder", "train": "nowhere"}
    (root / "catalog.json").write_text(json.dumps({"digits": entry, "mnist": absent}))
    return root


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Results of tests/ranks.py: {"one": one process, "rank0", "rank1": two gloo ranks}.

    They are computed once for all processes of pytest-xdist.
    """
    import torch
    from filelock import FileLock
    from launch import run_script

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            for ranks in (1, 2):
                run = run_script("tests/ranks.py", [folder], ranks)
                assert run.returncode == 0, run.stderr
    return {key: torch.load(folder / f"{key}.pt") for key in ("one", "rank0", "rank1")}
