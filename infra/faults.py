"""Faults of the machine, as a full disk or too little shared memory, told in one line."""

import errno
import re
import traceback
from contextlib import contextmanager

from utils import InputError

# Errors of any write: the disk is full or may not be written to.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# PyTorch's words for errors of the loader's workers, and the remedy.
WORKER_FAULTS = {
    r"shared memory|Bus error|unable to mmap": "shared memory (/dev/shm) is too small for the "
    "loader's workers; take 0 workers, or give it more (docker run with shm-size=8g or ipc=host)",
    r"[Tt]oo many open files|ancdata": "the loader's workers need more open files; raise the limit "
    "(ulimit -n), or take fewer workers",
    r"killed by signal: Killed": "a worker of the loader was killed, most likely as memory ran "
    "out; take fewer workers, or ask for more memory",
}


@contextmanager
def machine_faults():
    """Errors within that are the machine's fault become InputErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if remedy := describe_machine_fault(error):
            raise InputError(remedy) from error
        raise


def describe_machine_fault(error):
    """The fault and its remedy in one line; None if it is none of the machine's."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if "multiprocessing" in last and getattr(error, "errno", 0) in DISK_FAULTS:
        return next(iter(WORKER_FAULTS.values()))  # semaphores are in shared memory, too
    for words, remedy in WORKER_FAULTS.items():
        if re.search(words, str(error)):
            return remedy
    if getattr(error, "errno", 0) not in DISK_FAULTS:
        return None
    path = f"{error.filename}: " if error.filename else ""
    remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "allow writing there"
    return f"{path}{error.strerror}; {remedy}, or choose another folder"
