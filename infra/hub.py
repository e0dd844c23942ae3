"""Files of Hugging Face's hub, through the optional package huggingface_hub and its cache."""

import logging
from contextlib import contextmanager

from infra.untrusted import first_line
from utils import InputError


def fetch(repository, names, revision=None):
    """The path of the first of some files that a repository has, cached or downloaded.

    A file in the cache is not asked for again.

    Args:
        repository: "org/name".
        names: of the files, the preferred one first.
        revision: a branch, tag or commit; None: the main one.

    Raises InputError that says why there is none: offline, no such repository, no such file.
    """
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            "it needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    wanted = f"{names[0]} of https://huggingface.co/{repository} is wanted"
    try:
        for name in names:
            path = try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(path, str):
                return path
        for name in names:
            try:
                with quiet():
                    return hf_hub_download(repository, name, revision=revision)
            except LocalEntryNotFoundError:
                fault = "the cache does not hold it, and the hub cannot be reached"
                raise InputError(f"{wanted}: {fault}") from None
            except EntryNotFoundError:
                continue
    except InputError:
        raise
    except Exception as error:  # no such repository, and errors of the network of any kind
        raise InputError(f"{wanted}: {first_line(error)}") from error
    raise InputError(f"{wanted}: the repository has none of {', '.join(names)}")


@contextmanager
def quiet():
    """Silences the package's words on each try to connect."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
