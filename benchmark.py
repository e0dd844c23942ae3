"""Measures speed and memory; what is compared is measured in turn, within one run.

    python benchmark.py step --model SLIP_VITB16 --batch-size 256 --paper  # synthetic batches
    python benchmark.py train --model SLIP_VITB16 --workers 14 --paper     # from JPEG files
    python benchmark.py save --model SLIP_VITB16   # how long training waits for a checkpoint
    python benchmark.py data    # samples per second and core: archived code and ours
    python benchmark.py classifier  # prompts to a zero-shot classifier
    python benchmark.py features    # memory of classifiers on ImageNet-sized features
    python benchmark.py open    # metadata of 15 million pairs: conversion, opening, memory

`step` and `train` take the flags of main.py. --paper measures the archived way of training, too, on
today's libraries; --against="FLAGS" the same run with other flags.
"""

import argparse
import itertools
import os
import resource
import shlex
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import benchmark_data
import captions
import datasets
import engine
import losses
import main as training_script
import models
import utils
from infra import devices, distributed, logger
from infra.checkpoint_manager import CheckpointManager
from infra.run import Meters, TrainState
from infra.signals import SignalHandler
from tokenizer import SimpleTokenizer
from towers import CONTEXT_LENGTH, CausalSelfAttention

# glibc gives large blocks back to the system at once, and then page faults hide what is measured.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
PHASES = ("data", "forward", "backward", "optimizer")
PAPER = ("--no-compile", "--augment", "cpu", "--accum", "plain", "--clip-grad-norm", "0")

# ---------------------------------------------------------------------------------------------
# The machine's own limits


def best_rate(run, work, device, rounds=8):
    """The highest work / seconds of several calls of run()."""
    best = 0.0
    for _ in range(rounds + 2):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = max(best, work / (time.perf_counter() - started))
    return best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(precision):
    """TFLOP/s of products of square matrices in a precision."""
    device, n = precision.device, 8192 if precision.device.type == "cuda" else 2048
    a, b, out = (torch.randn(n, n, device=device).to(precision.dtype) for _ in range(3))
    return best_rate(lambda: torch.matmul(a, b, out=out), 2 * n**3, device) / 1e12


def copy_rate(device):
    """GB/s read and written by a copy within the device's memory."""
    size = 2**30 if device.type == "cuda" else 2**28
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return best_rate(lambda: a.copy_(b), 2 * size, device) / 1e9


# ---------------------------------------------------------------------------------------------
# The archived way of training, --paper


def masked_attention(attention, x):
    """models.CausalSelfAttention with a tensor for a mask."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    mask = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device, dtype=qkv.dtype).triu(1)
    x = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    return attention.out_proj(x.transpose(1, 2).flatten(2))


def separate_towers(model, text=None, **images):
    """models.Method.towers with a pass for each view."""
    features = {view: model.visual(x) for view, x in images.items()}
    return features if text is None else {**features, "text": model.read(text)}


def whole_contrast(contrast, queries, keys, labels, scale, hidden=None):
    """losses.Contrast with all rows at once, kept for backward."""
    total, hits = contrast.rows(queries, keys, labels, scale, hidden)
    return total / len(queries), 100 * hits / len(queries)


def as_archived(training, args):
    """Undoes what is faster here than in the archived code."""
    training.model.towers = partial(separate_towers, training.model)
    for module in [*training.model.modules(), *training.criterion.modules()]:
        if isinstance(module, CausalSelfAttention):
            module.forward = partial(masked_attention, module)
        elif isinstance(module, losses.InfoNCE):
            module.forward = partial(whole_contrast, module)
    training.optimizer = torch.optim.AdamW(
        utils.param_groups(training.model, args.wd), args.lr, args.betas, args.eps
    )
    training.feed.prepare = lambda batch: batch  # floats from the loader


def archived_loader(model, pairs, args):
    batches = len(pairs) // args.batch_size
    return DataLoader(
        benchmark_data.ArchivedDataset(
            pairs, Path(args.root), model.views, SimpleTokenizer(), model.image_size
        ),
        args.batch_size,
        sampler=datasets.EpochSampler(len(pairs), args.batch_size, batches, 0, 1, args.seed),
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


# ---------------------------------------------------------------------------------------------
# A measured training, in a process of its own


class Watch:
    """Charges time to phases: mark(phase) charges what has passed since the mark before it.

    On CUDA that is the device's time: marks are events on its stream.
    """

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self, phase):
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((phase, now))

    def seconds(self):
        """{phase: seconds}; forgets the marks."""
        synchronize(self.device)
        totals = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in itertools.pairwise(self.marks):
            on_device = self.device.type == "cuda"
            totals[phase] += start.elapsed_time(end) / 1e3 if on_device else end - start
        self.marks = []
        return totals


class MeasuredTraining:
    """A training of main.py whose phases are timed; `options` are benchmark.py's own."""

    def __init__(self, options, flags, is_paper):
        self.args = args = training_script.get_args_parser().parse_args(flags)
        self.is_paper, self.step = is_paper, 0
        self.device = device = distributed.init_distributed(args.device, args.dist_url)
        utils.seed_everything(args.seed)
        model = models.create_model(args.model, args.ssl_mlp_dim, args.ssl_emb_dim).to(device)
        precision = devices.Precision(args.precision, device)
        self.training = training_script.create_training(model, precision, 1000, args)
        self.tokens = CONTEXT_LENGTH if is_paper else options.caption_tokens
        self.gflop = self.gflop_per_sample(model)
        self.limits = {"matrices": matrix_rate(precision), "copy": copy_rate(device)}
        if is_paper:
            as_archived(self.training, args)
        self.batches = self.from_files(model) if options.command == "train" else self.synthetic()
        self.notes = [f"{precision.name} on {device.type}"]
        if args.compile if args.compile is not None else device.type == "cuda":
            views = training_script.empty_views(model, device, args.batch_size)
            reason = training_script.compile_training(model, self.training, views)
            self.notes.append(f"torch.compile failed: {reason}" if reason else "compiled")
        self.watch, self.meters = Watch(device), Meters()
        self.time_phases(model)

    def random_views(self, number):
        size = self.training.model.image_size
        views = {v: torch.randn(number, 3, size, size) for v in self.training.model.views}
        if "text" in views:
            views["text"] = torch.randint(1, 49000, (number, self.tokens))
        return devices.to_device(views, self.device)

    def gflop_per_sample(self, model):
        """Forward and backward of towers and heads, without recomputation."""
        with FlopCounterMode(display=False) as counter, engine.kept_buffers(model):
            outputs = model(**self.random_views(2))
            sum(x.float().sum() for x in outputs.values()).backward()
        model.zero_grad()
        return counter.get_total_flops() / 2 / 1e9

    def synthetic(self):
        self.training.feed.prepare = lambda batch: batch
        return itertools.repeat(self.random_views(self.args.batch_size))

    def from_files(self, model):
        if self.is_paper:
            pairs = captions.load_captions(self.args.dataset, self.args.metadata)
            loader = archived_loader(model, pairs, self.args)
        else:
            loader = training_script.open_loader(model, SimpleTokenizer(), self.device, self.args)
        for epoch in itertools.count():
            loader.sampler.go_to(epoch)
            for batch in loader:
                yield {k: v for k, v in batch.items() if k not in ("bad", "sources")}

    def time_phases(self, model):
        mark, feed, criterion = self.watch.mark, self.training.feed, self.training.criterion
        towers = model.towers

        def timed_feed(batch):
            mark("backward")
            batch = feed(batch)
            mark("data")
            return batch

        def timed(function, *args, **kwargs):
            result = function(*args, **kwargs)
            mark("forward")
            return result

        after_update = self.training.after_update
        self.training.feed = timed_feed
        self.training.criterion = partial(timed, criterion)
        model.towers = partial(timed, towers)
        self.training.optimizer.register_step_pre_hook(lambda *_: mark("backward"))
        self.training.after_update = lambda: (after_update(), mark("optimizer"))

    def take(self):
        for i in range(self.training.update_freq):
            self.watch.mark("backward" if i else "data")
            batch = next(self.batches)
            self.watch.mark("data")
            yield batch

    def round(self, updates):
        """{phase: seconds per update}, and "samples/s"."""
        synchronize(self.device)
        started = time.perf_counter()
        self.watch.mark("start")
        for i in range(updates):
            self.meters.update(engine.update(self.training, self.take(), self.step % 1000))
            self.step += 1
            if self.is_paper or (i + 1) % self.args.print_freq == 0:
                self.meters.read()
        phases = self.watch.seconds()
        seconds = time.perf_counter() - started
        samples = updates * self.args.batch_size * self.training.update_freq
        return {k: v / updates for k, v in phases.items()} | {"samples/s": samples / seconds}

    def memory(self):
        """Peak GB: allocated on a GPU, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def facts(self):
        return {"gflop": self.gflop, "notes": self.notes, "GB": self.memory(), **self.limits}


MEASURED = None  # the MeasuredTraining of this process, which measures one


def start(*args):
    global MEASURED
    MEASURED = MeasuredTraining(*args)


def call(method, *args):
    return getattr(MEASURED, method)(*args)


# ---------------------------------------------------------------------------------------------
# step, train


def variants_of(options, flags):
    """{name: (options, flags of main.py, is it --paper)}"""
    variants = {"this code": (options, flags, False)}
    for other in options.against:
        variants[other] = (options, [*flags, *shlex.split(other)], False)
    if options.paper:
        args = training_script.get_args_parser().parse_args(flags)
        is_half = torch.cuda.is_available() and args.precision not in ("fp32", "tf32")
        precision = ["--precision", "fp16"] if is_half else []
        variants["--paper"] = (options, [*flags, *PAPER, *precision], True)
    return variants


def summarize(rounds, facts):
    result = {key: median(r[key] for r in rounds) for key in rounds[0]}
    rate = result["samples/s"] * facts["gflop"] / 1e3  # TFLOP/s
    percent = 100 * rate / facts["matrices"]
    return {**result, **facts, "TFLOP/s": rate, "percent of matrices": percent}


def benchmark_training(options, flags):
    """Prints a row for each variant; returns {variant: its figures}."""
    with ExitStack() as stack:
        if options.command == "train" and "--root" not in flags:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            benchmark_data.write_pictures(Path(folder), options.samples, zips=0)
            flags = [*flags, "--dataset", "csv", "--root", folder]
            flags += ["--metadata", os.path.join(folder, "pairs.csv")]
        os.environ.update({} if options.default_malloc else KEEP_MEMORY)
        pools, rounds = {}, {}
        for name, arguments in variants_of(options, flags).items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            pools[name].submit(start, *arguments).result()
        for _ in range(options.rounds + 1):  # the first warms up
            for name, pool in pools.items():
                result = pool.submit(call, "round", options.updates).result()
                rounds.setdefault(name, []).append(result)
        facts = {name: pool.submit(call, "facts").result() for name, pool in pools.items()}
    return {name: summarize(rounds[name][1:], facts[name]) for name in rounds}


def print_training(results, options, flags):
    args, first = training_script.get_args_parser().parse_args(flags), results["this code"]
    images = "JPEG files" if options.command == "train" else "synthetic batches"
    print(f"{options.command}: {args.model}, {args.batch_size} x {args.update_freq} {images}")
    print(f"{benchmark_data.machine()}")
    print(f"captions of {options.caption_tokens} tokens; median of {options.rounds} rounds\n")
    head = ["samples/s", "ratio", "ms/update", *PHASES, "GFLOP", "TFLOP/s", "%rate", "GB"]
    width = max(map(len, results))
    print(" " * width + "".join(f"{name:>10}" for name in head))
    for name, r in results.items():
        ms = [1e3 * r[phase] for phase in PHASES]
        row = [r["samples/s"], first["samples/s"] / r["samples/s"], sum(ms), *ms]
        row += [r["gflop"], r["TFLOP/s"], r["percent of matrices"], r["GB"]]
        digits = [2, 2, *[0] * 5, 1, 3, 1, 2]
        print(f"{name:{width}}" + "".join(f"{x:10.{d}f}" for x, d in zip(row, digits, strict=True)))
    print()
    for name, r in results.items():
        print(f"{name}: {', '.join(r['notes'])}; this machine multiplies matrices in that")
        print(f"  precision at {r['matrices']:.3f} TFLOP/s and copies at {r['copy']:.1f} GB/s")


def draw(results, path):
    """Stacked bars: milliseconds of an update by phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(results)), layout="constrained")
    names, left = list(results), [0.0] * len(results)
    for phase in PHASES:
        widths = [1e3 * r[phase] for r in results.values()]
        axes.barh(names, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.text(end, name, f" {results[name]['samples/s']:.3g} samples/s", va="center")
    axes.set(xlabel="milliseconds an update", xlim=(0, 1.25 * max(left)))
    axes.invert_yaxis()
    axes.legend(ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def benchmark_steps(options, flags):
    results = benchmark_training(options, flags)
    print_training(results, options, flags)
    if options.save:
        folder = utils.make_folder(options.save)
        settings = {"machine": benchmark_data.machine(), "flags": flags}
        utils.write_json(folder / f"{options.command}.json", {**settings, "results": results})
        draw(results, folder / f"{options.command}.png")


# ---------------------------------------------------------------------------------------------
# Saving


def trained_once(name, device):
    """A model and its optimizer, with all the moments that a checkpoint holds."""
    model = models.create_model(name).to(device)
    optimizer = torch.optim.AdamW(utils.param_groups(model, 0.1), fused=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def benchmark_save(options):
    """Seconds that training waits for a save, and that its thread needs to write and prove it."""
    device = distributed.init_distributed(options.device)
    model, optimizer = trained_once(options.model, device)
    args = argparse.Namespace(keep_last=2, save_every_minutes=0)
    parts = {"state_dict": model, "optimizer": optimizer, "progress": TrainState()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, SignalHandler() as interrupts:
        keeper = CheckpointManager(
            folder, parts, interrupts, device, args, {"args": {"model": options.model}}
        )
        keeper.begin(logger.SilentLog())
        plain = {key: part.state_dict() for key, part in parts.items()}
        print(f"save: {options.model} on {device.type}; {benchmark_data.machine()}\n")
        for i in range(options.rounds):
            synchronize(device)
            waits, writes = timed(keeper.save), timed(keeper.wait)
            usual = timed(lambda: torch.save(plain, f"{folder}/plain.pt"))
            size = os.path.getsize(keeper.latest) / 1e9
            print(
                f"round {i}: training waits {waits:.3f} s, the thread writes {writes:.2f} s more; "
                f"torch.save alone {usual:.2f} s; {size:.2f} GB"
            )


# ---------------------------------------------------------------------------------------------


def get_args_parser():
    parser = utils.ArgumentParser("benchmark.py", "Measures speed and memory")
    commands = parser.add_subparsers(required=True, dest="command")

    for name, what in (("step", "synthetic batches"), ("train", "image files")):
        steps = commands.add_parser(name, description=f"training from {what}, by main.py's flags")
        steps.add_argument("--updates", type=utils.positive_int, default=10, help="in a round")
        steps.add_argument("--rounds", type=utils.positive_int, default=5)
        steps.add_argument("--caption-tokens", type=utils.positive_int, default=32)
        steps.add_argument("--paper", action="store_true", help="also the archived way to train")
        steps.add_argument("--against", action="append", default=[], help="also with these flags")
        steps.add_argument("--default-malloc", action="store_true", help="CPU: page faults and all")
        steps.add_argument("--save", help="folder for the figures as JSON and PNG")
        steps.set_defaults(measure=benchmark_steps)
    steps.add_argument("--samples", type=utils.positive_int, default=2048, help="JPEGs to write")

    saving = commands.add_parser("save", description="how long training waits for a checkpoint")
    saving.add_argument("--model", default="SLIP_VITB16")
    saving.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    saving.add_argument("--rounds", type=utils.positive_int, default=3)
    saving.add_argument("--folder", help="for the checkpoints; by default the system's")
    saving.set_defaults(measure=benchmark_save)

    data = commands.add_parser("data", description="samples per second and core, from files")
    data.add_argument(
        "--samples", type=utils.number(int, 2 * benchmark_data.BATCH), default=512, help="a round"
    )
    data.add_argument("--workers", type=utils.natural, default=0, help="loader processes")
    data.add_argument("--rounds", type=utils.positive_int, default=5)
    data.set_defaults(measure=benchmark_data.benchmark_data)

    prompts = commands.add_parser("classifier", description="prompts to a zero-shot classifier")
    prompts.add_argument("--model", default="CLIP_VITB16")
    prompts.add_argument("--classes", type=utils.positive_int, default=1000, help="of ImageNet's")
    prompts.add_argument(
        "--sample", type=utils.positive_int, default=100, help="of these, one at a time"
    )
    prompts.add_argument("--rounds", type=utils.positive_int, default=1)
    prompts.set_defaults(measure=benchmark_data.benchmark_classifier)

    frozen = commands.add_parser("features", description="memory of k-NN and logistic regression")
    frozen.add_argument("--images", type=utils.positive_int, default=1_281_167)
    frozen.add_argument("--width", type=utils.positive_int, default=768)
    frozen.add_argument("--classes", type=utils.positive_int, default=1000)
    frozen.add_argument("--queries", type=utils.positive_int, default=1024)
    frozen.add_argument("--iterations", type=utils.positive_int, default=1)
    frozen.add_argument("--folder", help="for the features, about 4 GB; by default the system's")
    frozen.set_defaults(measure=benchmark_data.benchmark_features)

    opening = commands.add_parser("open", description="metadata: conversion, opening, memory")
    opening.add_argument("--pairs", type=utils.positive_int, default=15_000_000)
    opening.add_argument("--workers", type=utils.positive_int, default=2)
    opening.add_argument("--reads", type=utils.positive_int, default=100_000, help="per worker")
    opening.add_argument("--folder", help="for the files, about 6 GB; by default the system's")
    opening.set_defaults(measure=benchmark_data.benchmark_open)
    return parser


def main(argv=None):
    options, flags = get_args_parser().parse_known_args(argv)
    if options.measure is benchmark_steps:
        training_script.get_args_parser().parse_args(flags)  # wrong ones are told before measuring
        return options.measure(options, flags)
    if flags:
        raise utils.InputError(f"unknown flags {' '.join(flags)}; see benchmark.py --help")
    options.measure(options)


if __name__ == "__main__":
    distributed.run_script(main)
