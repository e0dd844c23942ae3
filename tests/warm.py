"""For launch.py's server and for helpers.py: towers that train in a moment, and what every script
would import or read again after it is forked.
"""

import pyarrow.compute  # noqa: F401
import torch.utils.serialization.config  # noqa: F401
from PIL import Image

import tokenizer
import towers

NANO_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
towers.TOWERS["NANO8"] = towers.Tower("vit_tiny_patch16_224", NANO_VIT, 32, 8, 2, 1)
towers.TOWERS["NANORESNET"] = towers.Tower("test_resnet", {}, 32, 8, 2, 1)
Image.init()
tokenizer.read_merges(tokenizer.VOCABULARY)
