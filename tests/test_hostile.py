"""Files made to run code or to exhaust memory: each is refused in one line, and nothing happens.

A process of its own reads them all, in a folder where a file named canary would appear if any of
them ran, and notes the memory that each took. `pytest -s` prints how many were refused.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from payloads import MAKE, PAYLOADS, READERS, TABLE, WHOLE, files_of
from script_payloads import SCRIPT_PAYLOADS

from infra import untrusted

READER = Path(__file__).with_name("read_payloads.py")


def start_reading(folder):
    for name in ("payload.py", "hubconf.py"):
        (folder / name).write_text(f"{MAKE}\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", READER, folder],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The rows of read_payloads.py, which runs once for all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hostile"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            start_reading(folder)
    return [json.loads(line) for line in (folder / "results.txt").read_text().splitlines()]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused(results, payload):
    rows = [row for row in results if row["payload"] == payload]
    assert len(rows) == sum(len(READERS[form]) for form in files_of(payload))
    texts = {**TABLE, **WHOLE}[payload][0].split("|")
    is_shown = re.fullmatch(r"\w+(\.\w+)+", texts[0]) or payload in SCRIPT_PAYLOADS
    for row in rows:
        error = row["error"]
        assert error, f"{row['path']} was read"
        assert "\n" not in error and len(error) < 400 + len(row["path"])
        is_left_out = row["reader"] == "weights" and not is_shown  # as all but tensors is
        allowed = [*texts, "holds no weights"] if is_left_out else texts
        assert row["path"] in error and any(text in error for text in allowed), error
        assert not row["canary"] and not row["reached"]
        assert row["memory"] <= untrusted.SLACK


def test_how_many_were_refused(results):
    refused, most = [row for row in results if row["error"]], max(r["memory"] for r in results)
    names = {row["payload"] for row in results} - {r["payload"] for r in results if not r["error"]}
    files = len({row["path"] for row in refused})
    print(f"\npayloads refused: {len(names)} of {len(PAYLOADS)}, in {files} files")
    print(f"most memory beyond the size of a file: {most / 2**20:.0f} MiB")
    assert len(names) == len(PAYLOADS) > 100 and len(refused) == len(results)
