"""The weights and the text model that a training begins with, or finds in its own checkpoint."""

import os

from models import parse_name
from pretrained import open_weights
from text_models import open_text_model
from utils import InputError
from weight_names import tower_of


def open_initial_weights(source, model, latest):
    """The Weights that a run begins from, or None if it names none.

    Args:
        source: a string of weights, or "".
        model: METHOD_TOWER of the run.
        latest: path of the run's own checkpoint; if there is one, the former may be gone.
    """
    if not source:
        return None
    try:
        return open_weights(source, tower_of(model))
    except InputError:
        if not os.path.exists(latest):
            raise
        return open_weights(latest)


def find_text_model(name, model, weights, checkpoints):
    """The TextModel that a run begins or resumes with, or None.

    That of a checkpoint comes first, then that of the weights, so that neither the hub nor the
    folder is needed again.

    Args:
        name: of the hub, a folder, or "" for that of the model's row, if it has one.
        model: METHOD_TOWER of the run.
        weights: the Weights that it begins from, or None.
        checkpoints: paths of its own, which may be absent.

    Raises InputError for a method without text, and as open_text_model.
    """
    method, tower = parse_name(model)
    if "text" not in method.views:
        if name:
            raise InputError(f"{model} reads no text; leave text model {name} out")
        return None
    if not (name or tower.text_model):
        return None
    for path in filter(os.path.exists, checkpoints):
        try:
            return open_weights(path).tower.text_model
        except InputError:  # the run tells it when it resumes
            continue
    if weights and weights.tower.text_model:
        return weights.tower.text_model
    return open_text_model(name or tower.text_model.name)


def parts_of(model):
    """The entries of a checkpoint that hold a model: {key: object with a state_dict}."""
    text = getattr(model, "text", None)
    return {"state_dict": model} | ({"text_model": text.source} if text else {})
