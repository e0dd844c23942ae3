"""The form in which a model wants its images and texts.

It belongs to a tower's row, to the model, and to its checkpoint; whoever prepares images or texts
takes it from there. Checkpoints that hold none, as those released with the paper, have SLIP's.
"""

from dataclasses import asdict, dataclass

from utils import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # per channel
IMAGENET_STD = (0.229, 0.224, 0.225)
CHOICES = {  # keys of transforms.INTERPOLATIONS, towers.ACTIVATIONS, tokenizer.TOKENIZERS
    "interpolation": ("bilinear", "bicubic"),
    "activation": ("quick_gelu", "gelu"),
    "pooling": ("argmax", "mean"),
    "tokenizer": ("clip", "huggingface"),
}
LIMITS = {"image_size": 4096, "context_length": 4096}


@dataclass(frozen=True)
class Preprocessing:
    """The defaults are SLIP's. Raises InputError for values that no model here has."""

    image_size: int | None = None  # pixels of a side; None: the tower's own
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_min: float = 0.5  # least share of a picture's area in a training crop
    activation: str = "quick_gelu"  # of the text tower
    pooling: str = "argmax"  # of the text tower: at the token of the highest id; mean: over all
    tokenizer: str = "clip"  # or the text model's own
    context_length: int = 77  # tokens

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            is_triple = isinstance(values, (tuple, list)) and len(values) == 3
            is_triple = is_triple and all(map(is_number, values))
            if not is_triple or (name == "std" and min(values) <= 0):
                raise InputError(f"{name} {repr(values)[:80]} is not a number for each channel")
            object.__setattr__(self, name, tuple(map(float, values)))
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(choices)
                raise InputError(f"unknown {name} {repr(value)[:80]}; choose from {known}")
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if (name, value) != ("image_size", None) and not is_count(value, limit):
                raise InputError(f"{name} {repr(value)[:80]} is not a count up to {limit}")
        if not is_number(self.crop_min) or not 0 <= self.crop_min <= 1:
            raise InputError(f"crop_min {repr(self.crop_min)[:80]} is not a share")

    def to_dict(self):
        """Plain data, as `from_dict` takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Raises InputError for data of another kind."""
        if not isinstance(values, dict) or not values.keys() <= cls.__dataclass_fields__.keys():
            raise InputError(f"preprocessing {repr(values)[:80]} is of another kind")
        return cls(**values)


def is_number(value):
    return type(value) in (int, float) and -1e6 < value < 1e6  # not if it is no number


def is_count(value, limit):
    return type(value) is int and 0 < value <= limit


SLIP_PREPROCESSING = Preprocessing()
CLIP_PREPROCESSING = Preprocessing(  # OpenAI's and open_clip's
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    interpolation="bicubic",
    crop_min=0.9,
    activation="gelu",
)
