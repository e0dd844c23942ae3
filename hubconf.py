"""For torch.hub.load(FOLDER, "create_model_and_transforms", "ViT-B-32", source="local")."""

from models import list_models
from pretrained import (
    create_model_and_transforms,
    get_tokenizer,
    list_pretrained,
    load_model,
)

__all__ = [
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "list_pretrained",
    "load_model",
]
dependencies = ["ftfy", "regex", "safetensors", "timm", "torch", "torchvision"]
