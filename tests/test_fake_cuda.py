"""On a CUDA device that is not there (fake_cuda.py): no update waits for it, nothing mixes devices.

Not shown here: numbers, kernels, the time that anything takes, and what several ranks do.
"""

from itertools import islice

import pytest
import timm
import torch
from fake_cuda import CUDA, MixedDevices, Wait, aten, backward, fake_cuda
from helpers import BareRun, train_flags
from PIL import Image
from torch.utils._pytree import tree_leaves

import datasets
import engine
import eval_retrieval
import eval_zeroshot
import features
import losses
import main
import main_finetune
import main_linear
import models
import towers
import validation
from benchmarks.memory import to_fake
from catalog import LabelledViews
from evaluation import Evaluation
from infra.devices import Precision
from infra.run import Meters
from preprocessing import Preprocessing
from transforms import CropAndFlip

# Of a fake tensor that is copied with its module (timm's ModelEmaV3).
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture
def device():
    with fake_cuda() as device:
        yield device


def open_training(tiny, name, *flags, model=None):
    """(Training, EpochLoader) of main.py's flags, of two micro-batches an update."""
    given = train_flags(tiny, "out", "--update-freq", 2, "--clip-grad-norm", 1, *flags, model=name)
    args = main.get_args_parser().parse_args(given)
    model = model or models.create_model(name, args.ssl_mlp_dim, args.ssl_emb_dim).to(CUDA)
    loader = main.open_loader(model, CUDA, args)
    return main.create_training(model, Precision(args.precision, CUDA), 2, args), loader


def micro_batches(training, loader):
    """The first two batches as the loader's workers make them, without their notes."""
    batches = [*islice(loader.start(0), training.update_freq)]
    batches = [{k: x for k, x in b.items() if k not in ("bad", "sources")} for b in batches]
    training.prefetcher(batches[0])  # makes the constants that are kept on the device
    return batches


def check_update(device, training, batches):
    """One update without a wait, after which every parameter has a gradient on the device."""
    with device.no_wait():
        metrics = engine.update(training, batches, 1)
    trained = [p for group in training.optimizer.param_groups for p in group["params"]]
    moments = tree_leaves([training.optimizer.state[p] for p in trained])
    placed = [*metrics.values(), *trained, *[p.grad for p in trained], *moments]
    assert {x.device.type for x in placed if isinstance(x, torch.Tensor)} == {"cuda"}


# ---------------------------------------------------------------------------------------------
# Pre-training


@pytest.mark.parametrize(
    "tower, accum, precision",
    [
        ("NANO8", "plain", "fp32"),
        ("NANO8", "exact", "bf16"),
        ("NANORESNET", "plain", "bf16"),
        ("NANORESNET", "exact", "fp32"),
    ],
)
@pytest.mark.parametrize("method", models.METHODS)
def test_no_update_waits_or_mixes_devices(tiny, device, method, tower, accum, precision):
    flags = ["--accum", accum, "--precision", precision]
    t, loader = open_training(tiny, f"{method}_{tower}", *flags)
    assert loader.augments_on_device and loader.loader.pin_memory
    check_update(device, t, micro_batches(t, loader))
    assert device.counts[aten._fused_adamw_.default] == 2  # with and without weight decay


@pytest.mark.parametrize(
    "flags",
    [
        "--precision fp16 --accum exact",
        "--precision bf16 --grad-checkpointing",
        "--ema-decay 0.9 --lock-image --lock-image-unlocked-groups 2 --layer-decay 0.7",
    ],
)
def test_no_update_waits_whatever_the_flags(tiny, device, flags):
    t, loader = open_training(tiny, "SLIP_NANO8", *flags.split())
    check_update(device, t, micro_batches(t, loader))
    scaled = device.counts[aten._amp_update_scale_.default]
    assert scaled == ("fp16" in flags)


@pytest.mark.parametrize("name", ["SLIP_VITS16", "CLIP_RN50"])
def test_no_update_of_a_real_tower_waits(tiny, device, name):
    with torch.device("meta"):
        model = models.create_model(name)
    to_fake(model, CUDA)
    t, loader = open_training(tiny, name, "--precision", "bf16", "--update-freq", 1, model=model)
    check_update(device, t, micro_batches(t, loader))


def test_an_epoch_waits_at_its_end_alone(tiny, device, monkeypatch):
    """Metrics are read when the device has the next update; after the last one there is none."""
    t, loader = open_training(tiny, "SLIP_NANO8", "--precision", "bf16")
    micro_batches(t, loader)
    t.schedule, run, reads = [1e-3] * len(loader), BareRun(), []

    def read(self, real=Meters.read):
        reads.append((run.state.step, len(self.pending)))
        device.may_wait = run.state.step == len(loader) // 2
        return real(self)

    monkeypatch.setattr(Meters, "read", read)
    device.waits.clear()
    with device.no_wait():
        engine.train_one_epoch(t, loader, run, print_freq=1)
    assert reads == [(1, 1), (2, 1)] and device.waits == {"the latest event": 1}


def test_leaving_out_updates_waits_once_for_each(tiny, device):
    """By design: the program has to know whether the loss is finite before it takes the step."""
    t, loader = open_training(tiny, "SLIP_NANO8", "--skip-nonfinite", 1)
    batches = micro_batches(t, loader)
    device.waits.clear()
    engine.update_if_finite(t, batches, 1)
    assert device.waits == {str(aten._local_scalar_dense.default): 1}


# ---------------------------------------------------------------------------------------------
# These tests can fail


def at_loss(change):
    """A fault that looks at the loss, or changes it."""

    def inject(training, batches):
        criterion = training.criterion

        def changed(outputs):
            metrics = criterion(outputs)
            loss = change(metrics["loss"])
            return metrics | ({"loss": loss} if isinstance(loss, torch.Tensor) else {})

        training.criterion = changed
        return batches

    return inject


def unpin(training, batches):
    return [{k: x.clone() if torch.is_tensor(x) else x for k, x in b.items()} for b in batches]


def at_preparation(change):
    """A fault in the preparation of batches."""

    def inject(training, batches):
        own = training.prefetcher.prepare
        training.prefetcher.prepare = lambda batch: change(own(batch))
        return batches

    return inject


def mark_first(views):
    mask = torch.zeros(4, dtype=torch.bool, device=CUDA)
    views["image"][mask] = torch.zeros(1, 3, 32, 32, device=CUDA)
    return views


FAULTS = {
    "item": (Wait, at_loss(lambda loss: loss.item())),
    "bool": (Wait, at_loss(lambda loss: bool(loss > 1))),
    "tolist": (Wait, at_loss(lambda loss: loss.tolist())),
    "cpu": (Wait, at_loss(lambda loss: loss.cpu().item())),
    "nonzero": (Wait, at_loss(lambda loss: loss[None].nonzero().shape)),
    "synchronize": (Wait, at_loss(lambda loss: torch.cuda.synchronize())),
    "event": (Wait, at_loss(lambda loss: torch.cuda.current_stream().record_event().synchronize())),
    "list": (Wait, at_loss(lambda loss: loss * torch.tensor([2.0], device=CUDA)[0])),
    "unpinned batch": (Wait, unpin),
    "index on the CPU": (Wait, at_preparation(lambda v: {x: v[x][torch.arange(4)] for x in v})),
    "mask": (Wait, at_preparation(mark_first)),
    "CPU tensor": (MixedDevices, at_loss(lambda loss: (loss * torch.ones(2)).sum())),
    "CPU view": (MixedDevices, at_preparation(lambda v: v | {"image": torch.zeros(4, 3, 32, 32)})),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(tiny, device, fault):
    error, inject = FAULTS[fault]
    t, loader = open_training(tiny, "CLIP_NANO8", "--update-freq", 1, "--precision", "fp32")
    batches = inject(t, micro_batches(t, loader))
    with pytest.raises(error), device.no_wait():
        engine.update(t, batches, 1)


@pytest.mark.parametrize("name", ["SLIP_NANO8", "SIMCLR_NANORESNET"])
def test_the_backward_that_is_stood_in_for_is_the_engines(name):
    torch.manual_seed(0)
    model = models.create_model(name, 32, 16).double()
    if name == "SLIP_NANO8":
        model.set_grad_checkpointing()
    loss = losses.create_loss(model.loss)
    views = {view: torch.randn(4, 3, 32, 32).double() for view in model.views if view != "text"}
    if "text" in model.views:
        views["text"] = torch.randint(1, 400, (4, 16))
    gradients = []
    for run in (torch.autograd.backward, backward):
        run(loss(model(**views))["loss"])
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for ours, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# Evaluation

LABELLED = [(torch.zeros(3, 32, 32, dtype=torch.uint8), i % 3) for i in range(10)]


def evaluation(precision="bf16"):
    return Evaluation(Precision(precision, CUDA), batch_size=4, workers=0)


def without_waits(device, function):
    """The function; a wait within raises."""

    def call(*args, **options):
        with device.no_wait():
            return function(*args, **options)

    return call


@pytest.fixture
def clip(device):
    model = models.create_model("CLIP_NANO8").to(CUDA).eval()
    model.normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=CUDA))  # makes constants
    device.waits.clear()
    model.encode_image = without_waits(device, model.encode_image)
    model.encode_text = without_waits(device, model.encode_text)
    return model


def test_zero_shot_classification(device, clip):
    """By design it waits for the scores at the end, and as rows of prompts and images are sent."""
    texts = ["a photo of a {}.", "the {}"], ["cat", ["dog", "hound"], "owl"]
    task = eval_zeroshot.Task("digits", LABELLED, "test", "digits", texts[1], texts[0])
    ranking = eval_zeroshot.rank_images(clip, task, evaluation())
    assert ranking.top.shape == (10, 3) and not ranking.top.is_cuda
    assert device.waits["copy to the CPU"] == 1 and not device.waits["mask as an index"]


def test_retrieval(device, clip):
    e = evaluation()
    images, _ = eval_retrieval.embed_images(clip, LABELLED, e)
    texts = eval_retrieval.embed_texts(clip, ["a cat", "an owl"] * 10, e)
    owners = torch.arange(10, device=CUDA).repeat(2)
    assert images.is_cuda and texts.is_cuda and (images.dtype, texts.dtype) == (torch.float64,) * 2
    assert len(eval_retrieval.retrieval_scores(images, texts, owners)) == 10


class Pairs(validation.HeldOutPairs):
    def __init__(self):
        self.pairs, self.max_bad_fraction = [("x.jpg", ["a cat", "an owl"])] * 10, 0.1

    def read(self, row):
        return LABELLED[row][0]


def test_held_out_pairs(device, clip):
    """By design it waits for the images' rows, their ranks, and the loss."""
    scores = validation.score_pairs(clip, Pairs(), evaluation(), print)
    assert (scores["images"], scores["captions"], scores["bad_images"]) == (10, 20, 0)
    assert scores["loss"] > 0 and not device.waits["mask as an index"]


def test_features_knn_and_regression(device, clip, tmp_path):
    """The regression's optimizer runs on the CPU: by design it waits for each of its steps."""
    tower = without_waits(device, lambda images: clip.visual(clip.normalize(images)))
    data = features.extract(tower, 64, LABELLED, str(tmp_path / "x"), evaluation())
    assert not data[0].is_cuda and set(device.waits) == {"copy to the CPU"}
    rankings = features.knn_rankings(*data, *data, 3, [2, 5], 0.1, CUDA)
    assert rankings[5].top.shape == (10, 3)
    rows = torch.arange(10)
    regression = features.LogisticRegression(*data, rows, 3, CUDA)
    weights = regression.fit(1.0, max_iter=2)
    assert weights.is_cuda and weights.shape == (3, 65)
    assert features.rank_linear(*data, weights).top.shape == (10, 3)


# ---------------------------------------------------------------------------------------------
# The probe and fine-tuning


def labelled_batches(view, number):
    """Batches of 4 as the loaders of both scripts make them."""
    pictures = [(Image.new("RGB", (40, 30)), i % 3) for i in range(4 * number)]
    loader = datasets.open_loader(LabelledViews(pictures, view), 4, 0, CUDA, number)
    return list(loader.start(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_update_of_the_probe_waits(device, precision):
    args = main_linear.get_args_parser().parse_args(["--pretrained", "x", "--lr", "1"])
    probe = main_linear.Probe(models.create_model("CLIP_NANO8"), 3).to(CUDA)
    t = main_linear.create_training(probe, Precision(precision, CUDA), 2, args)
    (batch,) = labelled_batches(CropAndFlip(32), 1)
    t.prefetcher(batch)
    check_update(device, t, [batch])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "mixing", ["--mixup 0.8 --cutmix 0", "--mixup 0 --cutmix 1", "--mixup 0 --cutmix 0"]
)
def test_no_update_of_fine_tuning_waits(device, precision, mixing):
    flags = f"--pretrained x --batch-size 4 --update-freq 2 --clip-grad 1 --model-ema {mixing}"
    args = main_finetune.get_args_parser().parse_args(flags.split())
    tower = towers.TOWERS["NANO8"]
    vit = timm.create_model(tower.timm_name, **tower.options, num_classes=3, drop_path_rate=0.5)
    form = Preprocessing(image_size=32)
    model = main_finetune.Classifier(vit.to(CUDA), form)
    t = main_finetune.create_training(model, Precision(precision, CUDA), 2, args)
    batches = labelled_batches(main_finetune.TimmView(form, args), 2)
    check_update(device, t, batches)
    assert {x.device.type for x in t.average.module.state_dict().values()} == {"cuda"}
