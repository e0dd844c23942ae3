"""State dicts to and from other projects, compared with the projects themselves."""

import math
import zlib

import pytest
import torch

import layouts
from models import METHODS, create_model
from preprocessing import CLIP_PREPROCESSING
from tokenizer import SimpleTokenizer
from towers import CLIP_TOWERS, Tower
from utils import InputError

COUNTS = {  # open_clip's: parameters, those of the image tower and its projection
    "ViT-B-32": (151_277_313, 87_849_216),
    "ViT-B-32-quickgelu": (151_277_313, 87_849_216),
    "ViT-B-16": (149_620_737, 86_192_640),
    "ViT-B-16-plus-240": (208_377_345, 117_213_824),
    "ViT-L-14": (427_616_513, 303_966_208),
    "ViT-L-14-336": (427_944_193, 304_293_888),
    "ViT-H-14": (986_109_441, 632_076_800),
    "ViT-g-14": (1_366_678_273, 1_012_645_632),
    "RN50": (102_007_137, 38_316_896),
    "RN50-quickgelu": (102_007_137, 38_316_896),
    "RN101": (119_688_033, 56_259_936),
    "RN101-quickgelu": (119_688_033, 56_259_936),
    "RN50x4": (178_300_601, 87_137_080),
    "RN50x16": (290_979_217, 167_328_912),
    "RN50x64": (623_258_305, 420_380_352),
}
NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def noise_like(key, value):
    """A tensor's share of NOISE, repeated: drawing so many numbers takes long."""
    start = zlib.crc32(key.encode()) % len(NOISE)
    copies = math.ceil((start + value.numel()) / len(NOISE))
    return NOISE.repeat(copies)[start : start + value.numel()].view(value.shape)


def random_weights(state_dict):
    """Weights in the shapes of a state dict, with activations of ordinary size."""

    def draw(key, value):
        if not value.is_floating_point():
            return torch.tensor(7)
        noise = noise_like(key, value)
        if key == "logit_scale":
            return torch.tensor(2.6593)
        if key.endswith("running_var"):
            return noise.abs() + 0.5
        if value.ndim < 2:
            return 0.1 * noise + key.endswith("weight")
        is_out = key.endswith(("proj", "projection"))  # (in, out), others (out, in, ...)
        return noise * (value[:, 0] if is_out else value[0]).numel() ** -0.5

    return {key: draw(key, value) for key, value in state_dict.items()}


def on_meta(name):
    with torch.device("meta"):
        return create_model(name).eval()


def embed(encode_image, encode_text, size):
    """The embeddings of an image and of a text, (2, D)."""
    images = noise_like("image", torch.empty(1, 3, size, size, device="meta"))
    texts = SimpleTokenizer()(["a red bicycle leaning on a wall"])
    with torch.no_grad():
        return torch.cat([encode_image(images), encode_text(texts)])


def embed_ours(model):
    return embed(model.encode_image, model.encode_text, model.image_size)


def assert_same(a, b):
    """Equal keys, and tensors equal to the bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def assert_close(ours, theirs):
    """1e-4 of values whose size is about one."""
    assert all(0.3 < embedding.std() < 3 for embedding in theirs)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# The peers


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-plus-240", "RN50", "RN50x4"]
)
def test_embeddings_equal_those_of_open_clip_both_ways(name):
    import open_clip

    with torch.device("meta"):
        peer = open_clip.create_model(name, device="meta").eval()
    theirs = random_weights(peer.state_dict())
    peer.load_state_dict(theirs, assign=True)
    peer.attn_mask = torch.full((77, 77), -math.inf).triu(1)

    model = on_meta(f"CLIP_{name}")
    model.load_state_dict(layouts.from_open_clip(theirs), assign=True)
    assert_close(embed_ours(model), embed(peer.encode_image, peer.encode_text, model.image_size))
    # The same weights, so that the other direction gives the same embeddings.
    assert_same(layouts.to_open_clip(model.state_dict(), is_native=True), theirs)


def test_embeddings_equal_those_of_a_timm_tower_in_open_clip_both_ways():
    import open_clip

    image = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    text = {"width": 64, "heads": 1, "layers": 2}
    with torch.device("meta"):
        peer = open_clip.CustomTextCLIP(32, image | {"image_size": 160}, text).eval()
    theirs = random_weights(peer.state_dict())
    peer.load_state_dict(theirs, assign=True)
    peer.text.attn_mask = torch.full((77, 77), -math.inf).triu(1)
    assert "text.token_embedding.weight" in theirs

    model = small_model("test_vit", "CLIP", preprocessing=CLIP_PREPROCESSING)
    model.load_state_dict(layouts.from_open_clip(theirs), assign=True)
    assert_close(embed_ours(model), embed(peer.encode_image, peer.encode_text, 160))
    flat = {key.removeprefix("text."): value for key, value in theirs.items()}
    assert_same(layouts.to_open_clip(model.state_dict(), is_native=False), flat)


def test_embeddings_equal_those_of_hugging_face_both_ways():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    activation = {"hidden_act": "gelu"}
    config = CLIPConfig(text_config=sizes | activation, vision_config=activation)
    with torch.device("meta"):
        peer = CLIPModel(config).eval()
    theirs = random_weights(peer.state_dict())
    peer.load_state_dict(theirs, assign=True)
    for embeddings in (peer.text_model.embeddings, peer.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]

    model = on_meta("CLIP_ViT-B-32")
    old_files = {"text_model.embeddings.position_ids": torch.arange(77)}
    model.load_state_dict(layouts.from_huggingface(theirs | old_files), assign=True)
    embeddings = embed(
        lambda images: peer.get_image_features(images).pooler_output,
        lambda texts: peer.get_text_features(texts).pooler_output,
        224,
    )
    assert_close(embed_ours(model), embeddings)
    assert_same(layouts.to_huggingface(model.state_dict()), theirs)


# ---------------------------------------------------------------------------------------------
# Round trips and refusals


def small_model(timm_name, method="SLIP", **fields):
    with torch.device("meta"):
        model = METHODS[method](Tower(timm_name, {}, 32, 64, 1, 2, **fields), 8, 8).eval()
    model.load_state_dict(random_weights(model.state_dict()), assign=True)
    return model


SMALL = {
    "vit": ("vit_base_patch32_clip_224", True, "visual.conv1.weight"),
    "resnet": ("resnet50_clip", True, "visual.attnpool.c_proj.bias"),
    "timm": ("test_vit", False, "visual.trunk.patch_embed.proj.bias"),
    "convnext": ("test_convnext", False, "visual.trunk.head.norm.weight"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_weights_come_back_from_open_clip_as_they_were(kind):
    name, is_native, key = SMALL[kind]
    model = small_model(name, projection_bias=kind == "resnet")
    weights = model.state_dict()
    theirs = layouts.to_open_clip(weights, is_native)
    assert key in theirs and theirs[key].is_contiguous()
    kept = {k: v for k, v in weights.items() if not k.startswith("image_mlp.")}
    assert len(kept) < len(weights)
    surplus = {"context_length": torch.tensor(77), "attn_mask": torch.zeros(77, 77)}
    assert_same(layouts.from_open_clip(theirs | surplus), kept)
    if kind == "vit":
        assert_same(layouts.from_huggingface(layouts.to_huggingface(weights)), kept)


def test_an_unknown_layout_names_its_first_keys():
    keys = ("logit_scale", "encoder.a", "encoder.b", "visual.c", "visual.d")
    tensors = {key: torch.zeros(1) for key in keys}
    for convert in (layouts.from_open_clip, layouts.from_huggingface):
        with pytest.raises(
            InputError, match=r"4 keys unknown: encoder.a, encoder.b, visual.c, \.+"
        ):
            convert(tensors)
    model = small_model("test_vit")
    for convert in (layouts.to_huggingface, lambda weights: layouts.to_open_clip(weights, True)):
        weights = {"visual.norm_pre.ls.0": torch.zeros(1), **model.state_dict()}
        with pytest.raises(InputError, match="1 keys unknown: visual.norm_pre.ls.0$"):
            convert(weights)


def test_parts_of_attention_that_differ_in_shape_are_refused():
    name = "text_model.encoder.layers.0.self_attn.{}_proj.bias"
    parts = {name.format(part): torch.zeros(4) for part in "qkv"}
    assert (
        layouts.from_huggingface(parts)["transformer.resblocks.0.attn.in_proj_bias"].numel() == 12
    )
    for wrong in ({name.format("k"): torch.zeros(5)}, {name.format("v"): None}):
        left = {key: value for key, value in (parts | wrong).items() if value is not None}
        with pytest.raises(InputError, match="parts of .*qkv_proj.bias differ in shape"):
            layouts.from_huggingface(left)


# ---------------------------------------------------------------------------------------------
# Finding the tower


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_open_clips_and_the_tower_is_found(name):
    model = on_meta(f"CLIP_{name}")
    sizes = {key: param.numel() for key, param in model.named_parameters()}
    image = sum(n for key, n in sizes.items() if key.startswith(("visual.", "image_projection")))
    assert (sum(sizes.values()), image) == COUNTS[name]
    assert layouts.match_tower(model.state_dict()) == name.removesuffix("-quickgelu")
    assert len(COUNTS) == len(CLIP_TOWERS) + 3


def test_a_tower_is_found_at_other_numbers_of_positions(monkeypatch):
    rows = {name: CLIP_TOWERS[name] for name in ("ViT-L-14", "ViT-L-14-336", "RN50x16")}
    monkeypatch.setattr(layouts, "CLIP_TOWERS", rows)
    weights = on_meta("CLIP_ViT-L-14").state_dict()
    weights["positional_embedding"] = torch.empty(32, 768)
    assert layouts.match_tower(weights) == "ViT-L-14"
    weights["visual.pos_embed"] = torch.empty(1, 577, 1024)
    assert layouts.match_tower(weights) == "ViT-L-14-336"
    weights["visual.pos_embed"] = torch.empty(1, 401, 1024)
    assert layouts.match_tower(weights) == "ViT-L-14"


def test_what_fits_no_tower_is_named(monkeypatch):
    rows = {name: CLIP_TOWERS[name] for name in ("ViT-B-16-plus-240", "RN50x4", "RN50x16")}
    monkeypatch.setattr(layouts, "CLIP_TOWERS", rows)
    weights = on_meta("CLIP_RN50x4").state_dict()
    key = "visual.stages.3.1.conv2_kxk.conv.weight"
    for changed, fault in (
        ({key: torch.empty(1)}, f"1 keys of another shape: {key}"),
        ({"visual.cls_token": torch.empty(1)}, "1 keys unknown: visual.cls_token"),
        ({"visual.head.pos_embed": torch.empty(82, 5)}, "1 keys of another shape: .*pos_embed"),
        ({"text_projection": torch.empty(1, 1)}, "1 keys of another shape: text_projection"),
    ):
        with pytest.raises(InputError, match=rf"fit no tower; the nearest is RN50x4 \({fault}\)$"):
            layouts.match_tower(weights | changed)
    del weights[key]
    with pytest.raises(InputError, match=rf"RN50x4 \(1 keys missing: {key}\)$"):
        layouts.match_tower(weights)
