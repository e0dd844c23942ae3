"""Layers of towers, and locks: open_clip's names, gradients, modes, the proof, two ranks."""

from argparse import Namespace

import pytest
import timm
import torch
from helpers import assert_equal, exact_training, step_losses, train, views_of, weights

import engine
import layers
import layouts
import models
import warmup
from infra import compilation
from towers import TOWERS, create_visual
from utils import InputError

NONE = Namespace(
    lock_image=False, lock_image_unlocked_groups=0, lock_text=False, lock_text_unlocked_layers=0
)
NONE.patch_dropout = 0.0


def locked_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def locked(name, **flags):
    """A model on no device, locked by the flags."""
    with torch.device("meta"):
        model = models.create_model(name, 32, 16)
    layers.lock_towers(model, Namespace(**vars(NONE) | flags))
    return model


# ---------------------------------------------------------------------------------------------
# Names


@pytest.fixture(scope="module")
def peers():
    """open_clip's models by name, on no device: function -> (model, {its names: ours})."""
    import open_clip

    def build(name):
        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config(name))
        layout = layouts.OPEN_CLIP_VIT if name.startswith("ViT") else layouts.OPEN_CLIP_RESNET
        names = [key for key, _ in model.named_parameters()]
        return model, layouts.rename(names, layout)

    return build


@pytest.mark.parametrize(
    "name, image, text",
    [
        *[("ViT-B-32", n, None) for n in (0, 1, 2, 3, 12, 13)],
        *[("ViT-B-32", None, n) for n in (0, 1, 2, 12)],
        ("RN50", 0, None),
        ("RN50", None, 5),
    ],
)
def test_locked_names_are_open_clips(peers, name, image, text):
    theirs, ours = peers(name)
    flags = {}
    if image is not None:
        theirs.lock_image_tower(unlocked_groups=image)
        flags |= {"lock_image": True, "lock_image_unlocked_groups": image}
    if text is not None:
        # CLIP's own text tower counts the projection there, not here: it trains in any case.
        theirs.lock_text_tower(unlocked_layers=text + 1)
        flags |= {"lock_text": True, "lock_text_unlocked_layers": text}
    found = locked_names(locked(f"CLIP_{name}", **flags))
    assert found == {ours[key] for key in locked_names(theirs)}
    assert found and "logit_scale" not in found


@pytest.mark.parametrize(
    "name, stem, blocks, last",
    [
        ("VITTINY8", "patch_embed.proj.weight", ["blocks.3"], "norm.weight"),
        ("RN50", "stem.conv1.conv.weight", ["stages.3.2.conv1_1x1.conv.weight"], "head.q.weight"),
        ("convnext_atto", "stem.0.weight", ["stages.3.blocks.1.conv_dw.weight"], "head.norm.bias"),
        ("resnet18", "conv1.weight", ["layer4.1.conv1.weight"], None),
        ("swin_tiny_patch4_window7_224", "patch_embed.norm.weight", None, "norm.weight"),
    ],
)
def test_every_parameter_of_a_tower_has_one_layer(name, stem, blocks, last):
    tower = TOWERS.get(name)
    with torch.device("meta"):
        visual = create_visual(tower) if tower else timm.create_model(name, num_classes=0)
    found = layers.image_layers(visual)
    assert stem in found.stem and (last in found.last if last else found.last == [])
    assert not blocks or set(blocks) <= set(found.blocks[-1])
    places = layers.places(visual, found.depths())
    assert places.keys() == dict(visual.named_parameters()).keys()
    assert set(places.values()) == {i for i, layer in enumerate(found.depths()) if layer}


@pytest.mark.parametrize(
    "model, flags, match",
    [
        ("SIMCLR_NANO8", {"lock_text": True}, "lock of the text tower: the model has none; omit"),
        ("CLIP_NANO8", {"lock_image_unlocked_groups": 2}, "2 unlocked .* image tower: lock it"),
        ("CLIP_NANO8", {"lock_text_unlocked_layers": 1}, "1 unlocked .* text tower: lock it"),
        (
            "CLIP_NANO8",
            {"lock_image": True, "lock_image_unlocked_groups": 4},
            "4 unlocked groups of the image tower: it has 4; leave 3 at most",
        ),
        (
            "CLIP_NANO8",
            {"lock_text": True, "lock_text_unlocked_layers": 2},
            "2 unlocked groups of the text tower: it has 2; leave 1 at most",
        ),
        ("SLIP_NANO8", {"lock_image": True, "patch_dropout": 0.5}, "patch dropout: a locked"),
    ],
)
def test_locks_that_do_not_fit(model, flags, match):
    with pytest.raises(InputError, match=match) as error:
        locked(model, **flags)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Updates

LOCKS = "--lock-image --lock-image-unlocked-groups 2 --lock-text"


def test_a_locked_part_runs_in_evaluation_mode_and_keeps_its_statistics():
    t = exact_training("SLIP_NANORESNET", 1, flags=["--lock-image"])
    buffers = {key: x.clone() for key, x in t.model.visual.named_buffers()}
    t.model.train()
    assert t.model.training and t.model.image_mlp.bn1.training and t.model.transformer.training
    assert not any(module.training for module in t.model.visual.modules())
    engine.update(t, views_of(t.model, 8, 1), 0)
    assert_equal(dict(t.model.visual.named_buffers()), buffers)
    assert t.model.image_mlp.bn1.num_batches_tracked == 2
    assert {p for g in t.optimizer.param_groups for p in g["params"]} == {
        p for p in t.model.parameters() if p.grad is not None
    }


def test_of_a_tower_unlocked_in_part_only_the_locked_modules_do_not_train():
    t = exact_training("CLIP_NANO8", 1, flags=LOCKS.split())
    modes = {name: module.training for name, module in t.model.train().named_modules()}
    locked = {name for name, mode in modes.items() if not mode}
    assert {"visual.patch_embed", "visual.blocks.0", "visual.blocks.0.mlp.drop1"} <= locked
    assert {"transformer", "token_embedding", "ln_final"} <= locked
    assert modes["visual"] and modes["visual.blocks.1.mlp.drop1"] and modes["visual.norm"]


def saved_bytes(model, views):
    """Bytes that autograd keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        outputs = model.forward_features(**views)
    return sum(x.nbytes for x in kept), {view for view, x in outputs.items() if x.requires_grad}


def test_no_graph_is_built_for_a_locked_tower_nor_below_the_groups_that_train():
    free, top, image = (
        exact_training("CLIP_NANO8", 1, flags=["--lock-image", *flags][free:]).model
        for free, flags in ((1, []), (0, ["--lock-image-unlocked-groups", "2"]), (0, []))
    )
    images = {"image": views_of(free, 8, 1)[0]["image"]}
    (most, _), (some, _), (none, trained) = (saved_bytes(m, images) for m in (free, top, image))
    assert none == 0 and not trained
    assert 0.4 < some / most < 0.6  # one block of two


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_what_trains_are_those_without_locks(exact):
    name = "SLIP_NANO8"
    free = exact_training(name, 2, exact)
    batches = views_of(free.model, 8, 2)
    engine.update(free, batches, 0)
    for flags in (LOCKS.split(), ["--lock-image"]):
        t = exact_training(name, 2, exact, flags=flags)
        calls, tower = [], t.model.visual.forward
        t.model.visual.forward = lambda x, tower=tower, calls=calls: calls.append(1) or tower(x)
        engine.update(t, batches, 0)
        # A tower that is locked whole does not run a second time.
        assert len(calls) == (4 if exact and "--lock-text" in flags else 2)
        for key, param in t.model.named_parameters():
            expected = free.model.get_parameter(key).grad
            assert (param.grad is None) != param.requires_grad, key
            assert param.grad is None or torch.allclose(param.grad, expected, 1e-9, 1e-12), key


def test_heads_alone_may_train():
    """Then no tower runs a second time."""
    flags = "--lock-image --lock-image-unlocked-groups 1 --lock-text"
    t, free = (exact_training("CLIP_NANO8", 2, flags=f) for f in (flags.split(), []))
    batches = views_of(t.model, 8, 2)
    for training in (t, free):
        engine.update(training, batches, 0)
    trained = {key: p.grad for key, p in t.model.named_parameters() if p.grad is not None}
    assert trained.keys() == {"image_projection", "text_projection", "logit_scale"}
    for key, gradient in trained.items():
        assert torch.allclose(gradient, free.model.get_parameter(key).grad, 1e-9, 1e-12), key


def test_locked_blocks_compile(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "AFTERWARDS", "fail_on_recompile")
    t, free = (exact_training("CLIP_NANO8", 2, flags=f) for f in (LOCKS.split(), []))
    batches = views_of(t.model, 8, 2)
    modules = [*t.model.blocks(), *t.criterion.blocks()]
    assert warmup.try_compilation(t, modules, batches) == []
    engine.update(t, batches, 0)
    torch.compiler.set_stance("default")
    engine.update(free, batches, 0)
    gradient = t.model.visual.blocks[1].mlp.fc1.weight.grad
    assert torch.allclose(gradient, free.model.visual.blocks[1].mlp.fc1.weight.grad, 1e-9, 1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_two_ranks_have_the_gradients_of_one_process(exact, two_ranks):
    expected = two_ranks["one"]["locked"][True]["gradients"]  # of the whole batch
    got = two_ranks["rank0"]["locked"][exact]["gradients"]
    assert_equal(got, two_ranks["rank1"]["locked"][exact]["gradients"])
    assert {key for key, x in got.items() if x is None} == {
        k for k, x in expected.items() if x is None
    }
    if exact:
        for key, gradient in got.items():
            assert gradient is None or torch.allclose(gradient, expected[key], 1e-9, 1e-12), key


# ---------------------------------------------------------------------------------------------
# Runs


def test_a_run_proves_that_locked_parts_are_unchanged(tiny, tmp_path, capsys):
    whole = train(tiny, tmp_path, *LOCKS.split(), val="none", epochs=1)
    said = capsys.readouterr().out
    assert "locked: " in said and "warning: they are random numbers: --init-from" in said
    state = weights(whole)
    assert len(state["locked"]["digests"]) == 32  # two stems, two blocks, the text's norm
    assert "\n32 locked tensors are as they were when the run began\n" in said
    params = exact_training("SLIP_NANO8", 1, flags=LOCKS.split()).model.parameters()
    assert len(state["optimizer"]["state"]) == sum(p.requires_grad for p in params)

    key = "visual.blocks.0.norm1.weight"
    first = state["state_dict"][key].clone()
    state["state_dict"][key] += 1e-6
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=f"the checkpoint's {key} is locked, but not as it was"):
        train(tiny, tmp_path, *LOCKS.split(), val="none", epochs=2)
    state["state_dict"][key] = first
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="--lock-text-unlocked-layers 0, not 1; give the same"):
        extra = [*LOCKS.split(), "--lock-text-unlocked-layers", 1]
        train(tiny, tmp_path, *extra, val="none", epochs=2)


def test_a_locked_part_that_changed_ends_the_run_with_an_error(tiny, tmp_path, monkeypatch):
    trained = engine.train_one_epoch

    def train_and_spoil(training, *args):
        with torch.no_grad():
            training.model.visual.cls_token.add_(1e-6)
        return trained(training, *args)

    monkeypatch.setattr(engine, "train_one_epoch", train_and_spoil)
    with pytest.raises(RuntimeError, match="visual.cls_token is locked, but was changed"):
        train(tiny, tmp_path, "--lock-image", val="none", model="CLIP_NANO8")


def test_locked_weights_are_those_of_init_from(tiny, tmp_path, capsys):
    first = train(tiny, tmp_path / "first", val="none", model="SIMCLR_NANO8")
    flags = ["--lock-image", "--init-from", first / "checkpoint.pt", "--grad-checkpointing"]
    lit = train(tiny, tmp_path / "lit", *flags, val="none", model="SLIP_NANO8")
    said = capsys.readouterr().out
    assert "they are random" not in said and "the SimCLR loss trains its own head alone" in said
    before, after = (weights(folder)["state_dict"] for folder in (first, lit))
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("visual."), key
    plain = train(tiny, tmp_path / "plain", *flags[:3], val="none", model="SLIP_NANO8")
    assert step_losses(plain) == step_losses(lit)
