"""Machinery that no experiment edits. Sets up OpenMP, so it is imported before PyTorch.

OpenMP's threads wait for each other by spinning, which slows down everything else on the machine,
and most of all two trainings beside each other. A user's own settings win.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
