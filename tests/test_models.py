"""Towers and methods: public keys, parameter counts, initialisation, forward and backward."""

import hashlib

import pytest
import torch
from helpers import seeded_weights

import losses
import models
import warmup
from models import create_model
from optimization import param_groups
from tokenizer import SimpleTokenizer
from utils import InputError

CAPTIONS = [
    "a red bicycle leaning on a wall",
    "portrait of my grandmother, 1962",
    "IMG_0815",
    "fog",
]
COUNTS = {  # parameters, state-dict keys
    "CLIP_VITS16": (85_290_369, 301),
    "CLIP_VITB16": (149_619_969, 301),
    "CLIP_VITL16": (367_254_017, 445),
    "SIMCLR_VITS16": (41_089_152, 166),
    "SIMCLR_VITB16": (106_795_008, 166),
    "SIMCLR_VITL16": (325_346_560, 310),
    "SLIP_VITS16": (104_713_857, 317),
    "SLIP_VITB16": (170_616_321, 317),
    "SLIP_VITL16": (389_298_945, 461),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_keys_are_counted_as_published(name):
    with torch.device("meta"):
        model = create_model(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]


def test_state_dict_keys_are_pinned():
    with torch.device("meta"):
        keys = set(create_model("SLIP_VITS16").state_dict())
    block = "transformer.resblocks.11."
    pairs = ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    expected = {block + f"{name}.{part}" for name in pairs for part in ("weight", "bias")}
    expected |= {block + "attn.in_proj_weight", block + "attn.in_proj_bias"}
    expected |= {"token_embedding.weight", "positional_embedding", "image_projection"}
    expected |= {"ln_final.weight", "ln_final.bias", "text_projection", "logit_scale"}
    expected |= {f"image_mlp.layer{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"image_mlp.bn{i}.{part}" for i in (1, 2) for part in statistics}
    expected |= {"visual.cls_token", "visual.pos_embed", "visual.patch_embed.proj.weight"}
    assert expected <= keys
    assert not [key for key in keys if key.startswith(block) and key not in expected]


ORDERS = {  # digests of the state dict's keys and of the optimizer's parameters, in their order
    "CLIP_VITS16": "99c7202e609efbda",
    "SIMCLR_VITS16": "d7aa17b481121f05",
    "SLIP_VITS16": "ce4f996bd058b146",
    "CLIP_VITL16": "7d882be8af1df068",
    "SIMCLR_VITL16": "e122d988f8adfcfd",
    "SLIP_VITL16": "1a480b5141e43c2c",
    "CLIP_RN50": "fb69730c90c1577e",
    "SLIP_VITTINY8": "41683609ed482892",
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_keys_and_parameters_is_pinned(name):
    """Optimizer states load by order: another order gives a parameter another one's moments."""
    with torch.device("meta"):
        model = create_model(name)
    names = {id(param): key for key, param in model.named_parameters()}
    groups = param_groups(model, 0.1)
    order = [*model.state_dict(), *(names[id(p)] for group in groups for p in group["params"])]
    assert hashlib.sha256("\n".join(order).encode()).hexdigest()[:16] == ORDERS[name]


@pytest.mark.parametrize("name", ["CLIP_VITS16", "SIMCLR_VITS16", "SLIP_VITS16"])
def test_forward_and_backward_equal_the_archived_code(name, reference):
    expected = reference["models"][name]
    model = create_model(name, expected["ssl_mlp_dim"], expected["ssl_emb_dim"])
    model.load_state_dict(seeded_weights(model.state_dict()))
    generator = torch.Generator().manual_seed(11)
    batch = {v: torch.randn(4, 3, 224, 224, generator=generator) for v in ("image", "aug1", "aug2")}
    batch["text"] = SimpleTokenizer()(CAPTIONS)

    outputs = model(**{view: batch[view] for view in model.views})
    simclr = losses.SIMCLRLoss(0.1)
    loss_of = {models.CLIP: losses.CLIPLoss(), models.SIMCLR: simclr}
    loss_of[models.SLIP] = losses.SLIPLoss(losses.CLIPLoss(), simclr, 1.0)
    metrics = loss_of[type(model)](outputs)
    metrics["loss"].backward()

    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected["loss"], rel=1e-5)
    for key, values in expected["embed_first_values"].items():
        assert outputs[key][0, :4].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for key, value in expected["grad_norm"].items():
        assert gradients[key].norm().item() == pytest.approx(value, rel=1e-4), key


def test_clip_vitb16_runs_forward_and_backward():
    model = create_model("CLIP_VITB16")
    text = SimpleTokenizer()(CAPTIONS[:2])
    losses.CLIPLoss()(model(image=torch.randn(2, 3, 224, 224), text=text))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    model = create_model("CLIP_VITS16")
    block, width, layers = model.transformer.resblocks[3], 512, 12
    for weight, std in {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        block.attn.in_proj_weight: width**-0.5,
        block.attn.out_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        block.mlp.c_proj.weight: width**-0.5 * (2 * layers) ** -0.5,
        block.mlp.c_fc.weight: (2 * width) ** -0.5,
        model.image_projection: 384**-0.5,
        model.text_projection: width**-0.5,
    }.items():
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.visual.blocks[0].attn.num_heads == 12


@pytest.mark.parametrize(
    "name, width, embed_dim, size",
    [
        ("VITTINY8", 128, 128, 32),
        ("ViT-B-32", 768, 512, 224),
        ("RN50", 2048, 1024, 224),
        ("convnext_atto", 320, 512, 224),
        ("mobilenetv3_small_050", 1024, 512, 224),
    ],
)
def test_towers_and_any_timm_model(name, width, embed_dim, size):
    model = create_model(f"CLIP_{name}").eval()
    assert model.image_projection.shape == (width, embed_dim)
    assert model.image_size == size
    with torch.no_grad():
        assert model.encode_image(torch.randn(1, 3, size, size)).shape == (1, embed_dim)


@pytest.mark.parametrize(
    "name", ["SLIP_ViT-B-16-plus-240", "CLIP_ViT-L-14-336", "SLIP_RN50x4", "SIMCLR_RN50-quickgelu"]
)
def test_methods_take_clips_towers(name):
    """Its shapes, on the meta device, where no number is computed."""
    with torch.device("meta"):
        model = create_model(name, 32, 16)
        views = warmup.dummy_batch(model, 2, "meta")
        outputs = model(**views)
    sizes = {"image_embed": model.embed_dim, "text_embed": model.embed_dim, "logit_scale": None}
    sizes |= {"aug1_embed": 16, "aug2_embed": 16}
    assert {view.removesuffix("_embed") for view in outputs} >= set(model.views)
    for key, value in outputs.items():
        assert value.shape == ((2, sizes[key]) if sizes[key] else ()), key


@pytest.mark.parametrize("name", ["SLIP_VITTINY8", "SIMCLR_VITTINY8"])
def test_all_views_in_one_pass_are_each_view_in_its_own(name):
    torch.manual_seed(0)
    model = create_model(name, 32, 16).double()
    views = {v: torch.randn(3, 3, 32, 32).double() for v in model.views}
    if "text" in views:
        views["text"] = torch.randint(1, 400, (3, 16))
    passes, visual = [], model.visual
    model.visual.register_forward_hook(lambda *_: passes.append(1))
    features = model.forward_features(**views)
    assert len(passes) == 1 and features.keys() == views.keys()
    for view in views.keys() - {"text"}:
        assert torch.allclose(features[view], visual(views[view]), rtol=1e-12, atol=1e-12)
    # The head sees one view at a time: its statistics differ from those of both views.
    outputs = model.forward_head(features)
    assert torch.equal(outputs["aug1_embed"], model.image_mlp(features["aug1"]))


def test_towers_with_batch_norm_see_one_view_at_a_time():
    model = create_model("SIMCLR_test_resnet", 32, 16)
    views = {"aug1": torch.randn(4, 3, 64, 64), "aug2": 2 * torch.randn(4, 3, 64, 64)}
    features = model.forward_features(**views)
    for view in views:
        assert torch.equal(features[view], model.visual(views[view]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_convolutions_take_the_layout_of_their_device(device):
    """channels_last on CUDA only: on the CPU its kernels crash in some towers."""
    model = create_model("SIMCLR_test_resnet", 32, 16).to(device)
    weight = model.visual.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")
    assert model.to("cpu").visual.conv1[0].weight.is_contiguous()


@pytest.mark.parametrize("tower", ["fastvit_t8", "mobileone_s0"])
def test_reparameterised_towers_train_on_the_cpu(tower):
    """These ended the process in channels_last."""
    model = create_model(f"SIMCLR_{tower}", 32, 16).to("cpu")
    images = torch.randn(2, 3, model.image_size, model.image_size)
    features = model.forward_features(aug1=images)
    features["aug1"].sum().backward()
    assert features["aug1"].isfinite().all()


def test_text_tower_is_causal_and_pools_at_the_end_token():
    model = create_model("CLIP_VITTINY8").eval()
    tokenizer = SimpleTokenizer()
    tokens = tokenizer(CAPTIONS)
    changed = tokens.clone()
    for row in changed:
        row[row.argmax() + 1 :] = 7  # what follows the end token does not matter
    with torch.no_grad():
        full = model.encode_text(tokens)
        assert torch.allclose(model.encode_text(changed), full, atol=1e-6)
        assert tokenizer.trim(tokens).shape == (4, 16)
        assert torch.allclose(model.encode_text(tokenizer.trim(tokens)), full, atol=1e-6)
        changed = tokens.clone()
        changed[:, 1] += 1  # what precedes it does
        assert not torch.allclose(model.encode_text(changed), full, atol=1e-3)


def test_logit_scale_is_clamped():
    model = create_model("CLIP_VITTINY8")
    for value, clamped in ((9.0, 4.6052), (-1.0, 0.0), (3.0, 3.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(clamped)


@pytest.mark.parametrize(
    "name", ["SLIP", "VITB16", "MOCO_VITB16", "SLIP_VITB99", "", "clip_VITB16"]
)
def test_unknown_model_lists_the_choices(name):
    with pytest.raises(InputError, match="CLIP, SIMCLR, SLIP.*VITB16"):
        create_model(name)


def test_head_over_two_ranks_equals_one_process(two_ranks):
    one, first, second = (two_ranks[key]["head"] for key in ("one", "rank0", "rank1"))
    output = torch.cat([first["output"], second["output"]])
    assert torch.allclose(output, one["output"], rtol=0, atol=1e-12)
    for key, value in one["gradients"].items():
        assert torch.allclose(first["gradients"][key], value, rtol=1e-9, atol=1e-12), key
    for key, value in one["statistics"].items():
        assert torch.allclose(first["statistics"][key], value, rtol=1e-12, atol=1e-12), key
