"""Prints the installed versions of all that a requirements file needs, to be given to pip by -c."""

import platform
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# These belong to one build of torch.
OF_THE_BUILD = ("nvidia-", "cuda-", "triton", "pytorch-triton")

HEADER = f"""\
# Versions that work together, with Python {platform.python_version()} on \
{platform.system()} ({platform.machine()}):
#
#     pip install -r requirements.txt -c constraints.txt
#
# Written by "make constraints". "make" itself does not read this file: it installs the newest
# versions that requirements.txt allows.
#
# Listed is what requirements.txt needs, directly or not, without the tools of
# requirements-dev.txt. Left out are the packages of CUDA (nvidia-*, cuda-*, triton): torch names
# those that its build needs. The builds for the CPU, ROCm or another CUDA need none or others, and
# pins would keep pip from installing them. For the same reason versions have no suffix such as
# +cu130. On another system or Python, pip may need a package that is not listed here: it then
# takes the newest.
"""


def collect(requirement, extra, versions, seen):
    """Adds {name: version} of a requirement, and of all that it needs, to versions.

    extra: the extra of the package that has the requirement, or "".
    """
    requirement = Requirement(requirement)
    name = canonicalize_name(requirement.name)
    marker = requirement.marker
    if name.startswith(OF_THE_BUILD) or (marker and not marker.evaluate({"extra": extra})):
        return
    package = distribution(name)
    versions[name] = package.version.split("+")[0]
    for extra in {"", *requirement.extras}:
        if (name, extra) not in seen:
            seen.add((name, extra))
            for needed in package.requires or ():
                collect(needed, extra, versions, seen)


def main(path):
    versions, seen = {}, set()
    with open(path, encoding="utf-8") as file:
        for line in map(str.strip, file):
            if line and not line.startswith("#"):
                collect(line, "", versions, seen)
    print(HEADER, end="")
    for name, version in sorted(versions.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main(sys.argv[1])
