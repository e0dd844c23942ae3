"""Updates, accumulation, precision, the stop on a non-finite loss, and sharded prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BareRun, InOrder, Said
from torch import nn

import engine
import main
import models
from infra import devices
from infra.logger import SilentLog
from utils import InputError

CPU = torch.device("cpu")


class Rows(nn.Linear):
    """A model of one view, x."""

    def forward(self, x):
        return super().forward(x)


def training(precision="fp32", update_freq=1, lr=0.1, dtype=torch.float32, device=CPU, **options):
    torch.manual_seed(0)
    model = Rows(3, 1).to(device, dtype)
    return engine.Training(
        model=model,
        criterion=lambda outputs: {"loss": outputs.to(dtype).square().mean()},
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        schedule=np.full(100, lr),
        precision=devices.Precision(precision, device),
        update_freq=update_freq,
        **options,
    )


def loader(data, batch_size):
    rows = [{"x": row} for row in data]
    return InOrder(rows, batch_size)


def test_ranks_agree_on_a_batch_while_they_train_on_the_one_ahead_of_it():
    """Never do they begin an agreement and wait for it at once, but for an epoch's first batch."""
    events = []

    class Recorded(BareRun):
        def fetch(self, wait):
            events.append("fetch")
            return wait()

        def obey(self, before_save, is_whole):
            events.append("obey" if is_whole else "obey in mid-update")

    rows = loader(torch.arange(4.0).view(4, 1), 1).start(0)
    batches, taken = engine.Batches(rows, 4, training(update_freq=2), Recorded(), None), []
    for _ in range(2):
        for batch in batches.take(2):
            events.append("train")
            taken.append(batch["x"].item())
    assert taken == [0, 1, 2, 3]
    first, second = ["obey", "fetch", "train"], ["obey in mid-update", "fetch", "train"]
    last = ["obey in mid-update", "train"]  # and no agreement is left
    assert events == ["fetch", *first, *second, *first, *last]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(k):
    data = torch.randn(8, 3, dtype=torch.float64)
    whole, parts = training(dtype=torch.float64), training(update_freq=k, dtype=torch.float64)
    loss = engine.update(whole, [{"x": data}], 0)["loss"]
    other = engine.update(parts, [{"x": x} for x in data.chunk(k)], 0)["loss"]
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(parts.model.weight, whole.model.weight, rtol=1e-12)


def test_the_schedule_sets_the_rate_of_each_update():
    t = training()
    t.schedule = np.array([0.0, 0.5])
    before = t.model.weight.clone()
    engine.update(t, [{"x": torch.randn(4, 3)}], 0)
    assert torch.equal(t.model.weight, before)
    engine.update(t, [{"x": torch.randn(4, 3)}], 1)
    assert t.optimizer.param_groups[0]["lr"] == 0.5
    assert not torch.equal(t.model.weight, before)


@pytest.mark.parametrize("precision", list(devices.PRECISIONS))
def test_every_precision_trains_on_the_cpu(precision):
    t, data = training(precision), torch.randn(16, 3)
    losses = [engine.update(t, [{"x": data}], step)["loss"].item() for step in range(10)]
    assert losses[-1] < losses[0]
    assert t.model.weight.dtype == torch.float32
    assert t.precision.scaler.is_enabled() == (precision == "fp16")
    with t.precision.autocast():
        assert t.model(data).dtype == devices.PRECISIONS[precision]


def test_the_cpu_defaults_to_fp32():
    assert devices.Precision(None, CPU).name == "fp32"


def test_an_epoch_leaves_out_batches_that_fill_no_update():
    t = training(update_freq=2)
    means, speed = engine.train_one_epoch(t, loader(torch.randn(20, 3), 4), BareRun())
    assert speed["pairs"] == 16  # five batches of 4, two updates of 2
    assert set(means) == {"loss"}
    assert 0 <= speed["data_wait"] <= 1 and speed["samples_per_sec"] > 0


def test_a_loss_that_is_not_finite_stops_with_its_step():
    t = training()
    data = torch.randn(8, 3)
    data[5] = torch.nan
    with pytest.raises(InputError, match=r"loss is nan at update 10 \(epoch 2\) on rank 0"):
        engine.train_one_epoch(t, loader(data, 2), BareRun(epoch=2), print_freq=2)


class Scalars(SilentLog):
    """A log of {update: the mean loss that is logged at it}, and of the updates made by then."""

    def __init__(self, training):
        self.training, self.means, self.made = training, {}, []

    def scalars(self, values, step):
        self.means[step] = values["train/loss"]
        self.made.append(self.training.made)


def counted_training(**options):
    """A training that counts its updates; its loss is the mean of the batch."""
    t = training(**options)
    t.made, t.model.forward = 0, lambda x: x + 0 * t.model.weight.sum()
    t.criterion = lambda outputs: {"loss": outputs.mean()}

    def count():
        t.made += 1

    t.after_update = count
    return t


def test_means_are_read_one_update_later():
    """The device then has that update to do; the means are those of the updates before it."""
    t = counted_training()
    data = torch.arange(1.0, 6).repeat_interleave(2)[:, None]  # the losses of five updates
    log = Scalars(t)
    means, _ = engine.train_one_epoch(t, loader(data, 2), BareRun(log), print_freq=2)
    assert log.means == {1: 1.5, 3: 3.5, 4: 5.0} and means == {"loss": 3.0}
    assert log.made == [3, 5, 5]


class Saving(BareRun):
    """A run that saves before each update from number `first` on; notes the losses saved."""

    def __init__(self, first, log=None):
        super().__init__(log)
        self.first, self.saved = first, []

    def obey(self, before_save, is_whole=True):
        if is_whole and self.state.step >= self.first:
            before_save()
            self.saved.append((self.state.step, [row[0] for row in self.state.meters.window]))


def test_a_save_has_the_metrics_of_all_updates_before_it():
    t = counted_training()
    run = Saving(2, Scalars(t))
    data = torch.arange(1.0, 6).repeat_interleave(2)[:, None]
    engine.train_one_epoch(t, loader(data, 2), run, print_freq=2)
    assert run.saved == [(2, [1.0, 2.0]), (3, [3.0]), (4, [3.0, 4.0])]
    assert run.log.means == {1: 1.5, 3: 3.5, 4: 5.0}  # as without a save


@pytest.mark.parametrize("first, noticed", [(2, [2, 2, 3, 4, 5]), (99, [2, 2, 4, 4, 5])])
@pytest.mark.parametrize("bad", range(5))
def test_a_loss_that_is_not_finite_is_never_saved(bad, first, noticed):
    """It is noticed before a save, or else when metrics are read; its own samples are listed."""
    data = [{"x": torch.ones(1), "sources": {"index": i}} for i in range(20)]
    data[4 * bad + 3]["x"] *= torch.nan
    run, listed = Saving(first), {}
    run.log.dump = lambda name, facts: listed.update(facts) or name

    def collate(items):
        return {"x": torch.stack([i["x"] for i in items]), "sources": [i["sources"] for i in items]}

    with pytest.raises(InputError, match=rf"loss is nan at update {bad} .*nonfinite-{bad}.json"):
        t = counted_training(update_freq=2)
        engine.train_one_epoch(t, InOrder(data, 2, collate), run, print_freq=2)
    assert run.state.step == noticed[bad]
    assert [source["index"] for source in listed["samples"]] == [4 * bad + i for i in range(4)]
    assert np.isfinite([loss for _, saved in run.saved for loss in saved]).all()


def test_the_samples_of_a_loss_that_is_not_finite_are_listed(two_ranks):
    """Rank 1's second batch is bad; ranks read their losses at the third and stop together."""
    for rank in ("rank0", "rank1"):
        error, path = two_ranks[rank]["nonfinite"]
        assert "loss is nan at update 4 (epoch 1) on rank 1; lower the learning rate" in error
        assert f"its samples are listed in {path}" in error
        assert path.endswith("nonfinite-4.json")
    facts = json.loads(Path(path).read_text())
    assert {k: facts[k] for k in ("update", "epoch", "rank", "loss")} == {
        "update": 4,
        "epoch": 1,
        "rank": 1,
        "loss": "nan",
    }
    names = [(x["rank"], x["path"]) for x in facts["samples"]]
    assert names == [(0, "2.jpg"), (0, "3.jpg"), (1, "12.jpg"), (1, "13.jpg")]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_step_and_logs_the_norm(precision):
    """Gradients that fp16 scales are measured in their own units."""

    def step(**options):
        t = training(precision, **options)
        before = [p.clone() for p in t.model.parameters()]
        metrics = engine.update(t, [{"x": torch.full((4, 3), 0.1)}], 0)
        moved = [p - b for p, b in zip(t.model.parameters(), before, strict=True)]
        return metrics, torch.cat([x.flatten() for x in moved]).norm().item() / 0.1  # SGD's rate

    (metrics, clipped), (_, free) = step(clip_grad_norm=0.05), step()
    assert clipped == pytest.approx(0.05, rel=1e-3)
    assert metrics["grad_norm"].item() == pytest.approx(free, rel=1e-3)
    assert free > 0.1


def test_prediction_counts_every_image_once_on_any_number_of_ranks(two_ranks):
    scores, labels = two_ranks["one"]["predictions"]
    assert scores[:, 0].tolist() == list(range(11))
    assert labels.tolist() == [i % 3 for i in range(11)]
    for rank in ("rank0", "rank1"):
        assert torch.equal(two_ranks[rank]["predictions"][0], scores)
        assert torch.equal(two_ranks[rank]["predictions"][1], labels)
        assert two_ranks[rank]["few_predictions"][0].tolist() == [[1.0, 1.0]]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", list(devices.PRECISIONS))
def test_every_precision_trains_on_cuda(precision):
    t = training(precision, device=torch.device("cuda"))
    data = torch.randn(16, 3)
    losses = [engine.update(t, [{"x": data}], step)["loss"].item() for step in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("clip_grad_norm", [0.0, 1.0])
def test_a_gradient_that_fp16_scaled_too_far_does_not_end_the_run(clip_grad_norm):
    """Its update is left out, at half the scale the next one is tried; clipped or not."""
    t = training("fp16", clip_grad_norm=clip_grad_norm)
    before, data = t.model.weight.clone(), 100 * torch.randn(8, 3)
    means, _ = engine.train_one_epoch(t, loader(data, 4), BareRun(), print_freq=1)
    assert np.isfinite(list(means.values())).all()
    assert torch.equal(t.model.weight, before) and t.precision.scaler.get_scale() == 2**14


@pytest.mark.cuda
@pytest.mark.parametrize("k, exact", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(k, exact, precision):
    device = torch.device("cuda")
    args = main.get_args_parser().parse_args(["--update-freq", str(k), "--clip-grad-norm", "1"])
    args.accum = "exact" if exact else "plain"
    model = models.create_model("SLIP_NANO8", 32, 16).to(device)
    t = main.create_training(model, devices.Precision(precision, device), 10, args)
    batch = {v: torch.zeros(8, 3, 32, 32, dtype=torch.uint8) for v in ("image", "aug1", "aug2")}
    batch["text"] = torch.randint(1, 400, (8, 16))
    batch = {v: x.pin_memory() for v, x in batch.items()}
    engine.update(t, [{**batch, "steps": {}} for _ in range(k)], 0)  # allocates, chooses kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.update(t, [{**batch, "steps": {}} for _ in range(k)], 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_batches_prepared_beside_the_step_arrive_whole():
    t = training(device=torch.device("cuda"))
    t.prefetcher.prepare = lambda batch: {"x": (batch["x"] * 2).sqrt().square()}
    batches = [torch.full((1000, 1000), float(i)).pin_memory() for i in range(20)]
    totals = [t.prefetcher({"x": x})["x"].mean() for x in batches]
    assert [round(x.item()) for x in totals] == [2 * i for i in range(20)]


@pytest.mark.parametrize("name", ["SLIP_NANO8", "SLIP_NANORESNET"])
def test_images_in_the_precision_of_the_towers_change_no_bit(name):
    """Autocast would round them at the first convolution."""
    torch.manual_seed(0)
    args, device = main.get_args_parser().parse_args([]), torch.device("cpu")
    model = models.create_model(name, 32, 16)
    t = main.create_training(model, devices.Precision("bf16", device), 10, args)
    size = (8, 3, model.image_size, model.image_size)
    batch = {v: torch.randint(256, size, dtype=torch.uint8) for v in ("image", "aug1", "aug2")}
    text = torch.randint(1, 400, (8, 16))
    rounded = t.prefetcher({**batch, "text": text, "steps": {}})
    assert {rounded[v].dtype for v in batch} == {torch.bfloat16}
    exact = {v: model.normalize(x) for v, x in batch.items()}
    with t.precision.autocast(), engine.kept_buffers(model):
        outputs = [model(**{**images, "text": text}) for images in (rounded, exact)]
    for key, x in outputs[0].items():
        assert torch.equal(x, outputs[1][key]), key


class Batched(nn.Module):
    """A model with parameters and batch statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.norm(x))


def batched_training(precision="fp32", **options):
    torch.manual_seed(0)
    model = Batched()
    return engine.Training(
        model=model,
        criterion=lambda outputs: {"loss": outputs.float().square().mean()},
        optimizer=torch.optim.AdamW(model.parameters()),
        schedule=np.full(100, 0.1),
        precision=devices.Precision(precision, CPU),
        **options,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_updates_that_are_not_finite_are_left_out(precision):
    """All is as if their batches had not been there: weights, moments, batch norm, means."""
    data = torch.randn(24, 3)
    bad = data.clone()
    bad[5], bad[13] = torch.nan, torch.inf  # in updates 1 and 3 of 6
    t, run = batched_training(precision, skip_nonfinite=2), BareRun(Said())
    means, _ = engine.train_one_epoch(t, loader(bad, 4), run, print_freq=2)
    sound = torch.cat([data[:4], data[8:12], data[16:]])
    other = batched_training(precision)
    expected, _ = engine.train_one_epoch(other, loader(sound, 4), BareRun())
    assert means == pytest.approx(expected)
    for key, value in other.model.state_dict().items():
        assert torch.equal(t.model.state_dict()[key], value), key
    for i, moments in other.optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(t.optimizer.state_dict()["state"][i][key], value)
    assert run.state.skipped == 2 and run.state.updates == run.state.step == 6
    lines = run.log.lines
    assert [line.partition(":")[0] for line in lines] == [
        "skipped, 1 of 2",
        "skipped, 2 of 2",
    ]
    assert "loss is nan at update 1 (epoch 0) on rank 0" in lines[0]


def test_one_update_too_many_that_is_not_finite_stops():
    data = torch.randn(24, 3)
    data[5] = data[13] = torch.nan
    t = batched_training(skip_nonfinite=1)
    with pytest.raises(InputError, match=r"more than 1 updates .*loss is nan at update 3"):
        engine.train_one_epoch(t, loader(data, 4), BareRun())


def test_a_gradient_that_is_not_finite_is_left_out_as_well():
    t = batched_training(skip_nonfinite=1)
    t.criterion = lambda outputs: {"loss": (0 * outputs.sum()).sqrt()}  # 0, of infinite slope
    before = {key: value.clone() for key, value in t.model.state_dict().items()}
    log = Said()
    engine.train_one_epoch(t, loader(torch.randn(4, 3), 4), BareRun(log))
    assert all(torch.equal(value, before[key]) for key, value in t.model.state_dict().items())
    assert "gradient is not finite at update 0" in log.lines[0]


def test_an_epoch_goes_on_behind_the_samples_it_has_seen():
    """Also where its batch is another one now: three updates of 4 were six of 2."""
    data = torch.randn(24, 3)
    t, run = training(), BareRun(epoch=1, step=6, batch=2)
    engine.train_one_epoch(t, loader(data, 4), run)
    other = training()
    engine.train_one_epoch(other, loader(data[12:], 4), BareRun())
    assert torch.equal(t.model.weight, other.model.weight)
    assert (run.state.step, run.state.batch, run.state.samples) == (6, 4, 12)
