"""Files of Hugging Face's hub, through the optional package huggingface_hub and its cache."""

from infra.untrusted import first_line
from utils import InputError


def fetch(repository, names, revision=None):
    """The path of the first of some files that a repository has; downloads it if it is not cached.

    Args:
        repository: "org/name".
        names: of the files, the preferred one first.
        revision: a branch, tag or commit; None: the newest.

    Raises InputError that says why there is none: offline, no such repository, no such file.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            "downloads need the package huggingface_hub: pip install huggingface_hub"
        ) from error
    reason = None
    for name in names:
        try:
            return hf_hub_download(repository, name, revision=revision)
        except LocalEntryNotFoundError:
            reason = "the hub cannot be reached, and the cache does not hold it"
        except EntryNotFoundError:
            continue
        except Exception as error:  # the package's kinds of network errors change
            reason = first_line(error)
            break
    reason = reason or f"the repository has none of {', '.join(names)}"
    raise InputError(f"{names[0]} of https://huggingface.co/{repository} is wanted: {reason}")
