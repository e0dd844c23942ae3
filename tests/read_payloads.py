"""Reads every payload; test_hostile.py starts it as a process in an empty folder, its argument.

results.txt gets a line for each file: its refusal, its memory, and any sign that it ran.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from payloads import PAYLOADS, READERS, files_of

REPOSITORY = Path(__file__).parent.parent
REACHING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def peak_memory(reset=False):
    """The most memory, in bytes, that this process had in use (since the last reset)."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def read_all(folder):
    """Writes and reads every file in `folder`, the current one, and notes the results there."""
    sys.path[0] = str(REPOSITORY)

    import captions
    import models
    import pretrained
    from infra import checkpoint, weights
    from utils import InputError

    def read_run(path):  # as resuming does, then as the evaluations do
        checkpoint.load(path)
        pretrained.load_model(path)

    read = {"model": read_run, "weights": weights.read}
    read["pkl"] = lambda path: captions.load_captions("yfcc15m", path)
    read["npy"] = lambda path: captions.load_captions("cc3m", path)
    models.create_model("CLIP_VITTINY8")  # pages of the libraries' code are no memory of a payload
    reached = []
    sys.addaudithook(lambda event, _: reached.append(event) if event in REACHING else None)
    for number, payload in enumerate(PAYLOADS):
        for form, content in files_of(payload).items():
            path = folder / f"{number}.{form}"
            path.write_bytes(content)
            for reader in READERS[form]:
                before, error = peak_memory(reset=True), None
                try:
                    read[reader](path)
                except InputError as refusal:
                    error = str(refusal)
                row = {"payload": payload, "reader": reader, "path": str(path), "error": error}
                row |= {"memory": peak_memory() - before - len(content), "reached": reached}
                row |= {"canary": os.path.exists("canary")}
                with open("results.txt", "a") as file:
                    file.write(json.dumps(row) + "\n")
                reached.clear()


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
