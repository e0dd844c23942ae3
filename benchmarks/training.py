"""The commands step and train of benchmark.py: the phases of an update.

Each variant of a training runs in a process of its own.
"""

import itertools
import os
import resource
import shlex
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import captions
import contrast
import engine
import main as main_script
import utils
import warmup
from benchmarks import archived
from benchmarks.data import machine, write_pictures
from benchmarks.limits import copy_rate, matrix_rates, synchronize
from infra import devices, distributed
from infra.run import Meters
from preprocessing import SLIP_PREPROCESSING

# By default glibc returns large blocks to the system at once, and page faults distort the figures.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
PHASES = ("data", "forward", "backward", "optimizer")
UPDATES = 1000  # of an epoch, for the schedule of the learning rate

# ---------------------------------------------------------------------------------------------
# A measured training


@dataclass
class Variant:
    """A training to measure."""

    flags: list  # of main.py
    from_files: bool = False  # images are read from files; otherwise a batch of noise repeats
    caption_tokens: int = SLIP_PREPROCESSING.context_length  # of a synthetic batch
    is_archived: bool = False


class Watch:
    """Charges time to phases: mark(phase) charges the time since the previous mark.

    On CUDA it is the device's time: marks are events on its stream.
    """

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self, phase):
        now = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((phase, now))

    def charged(self, phase, function, before=None):
        """The function, with mark(phase) after each call and mark(before), if given, ahead."""

        def marked(*args, **kwargs):
            if before:
                self.mark(before)
            result = function(*args, **kwargs)
            self.mark(phase)
            return result

        return marked

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
    """A training of main.py whose phases are timed."""

    def __init__(self, variant):
        self.variant, self.step = variant, 0
        self.args = args = main_script.get_args_parser().parse_args(variant.flags)
        self.device = distributed.init_distributed(args.device, args.dist_url)
        utils.seed_everything(args.seed)
        model, _ = main_script.create_model(args)
        self.model = model.to(self.device)
        precision = devices.Precision(args.precision, self.device)
        self.training = main_script.create_training(self.model, precision, UPDATES, args)
        self.gflop = self.gflop_per_sample()
        self.limits = {**matrix_rates(precision), "copy": copy_rate(self.device)}
        if variant.is_archived:
            archived.as_archived(self.training, args)
        if variant.is_archived or not variant.from_files:
            self.training.prefetcher.prepare = lambda batch: batch  # its images are floats already
        self.batches = self.from_files() if variant.from_files else self.synthetic()
        self.notes = [f"{precision.name} on {self.device.type}"]
        if warmup.is_compiled(args, self.device):
            self.notes.append(self.compile())
        self.watch, self.meters = Watch(self.device), Meters()
        self.time_phases()
        self.free()

    def random_views(self, number):
        """{view: (number, ...) tensor} of noise on the device."""
        size = self.model.image_size
        views = {view: torch.randn(number, 3, size, size) for view in self.model.views}
        if "text" in views:
            most = min(49000, self.model.text_tower.vocabulary)
            views["text"] = torch.randint(1, most, (number, self.variant.caption_tokens))
        views |= contrast.extra_views(self.args.duplicates, number)
        return devices.to_device(views, self.device)

    def gflop_per_sample(self):
        """Of towers and heads, forward and backward, without recomputation."""
        with FlopCounterMode(display=False) as counter, engine.kept_buffers(self.model):
            outputs = self.model(**self.random_views(2))
            sum(x.float().sum() for x in outputs.values()).backward()
        self.model.zero_grad()
        return counter.get_total_flops() / 2 / 1e9

    def synthetic(self):
        return itertools.repeat(self.random_views(self.args.batch_size))

    def from_files(self):
        loader = self.open_loader()
        for epoch in itertools.count():
            for batch in loader.start(epoch):
                yield {k: v for k, v in batch.items() if k not in ("bad", "sources")}

    def open_loader(self):
        args = self.args
        if not self.variant.is_archived:
            return main_script.open_loader(self.model, self.device, args)
        pairs, model = captions.load_captions(args.dataset, args.metadata), self.model
        dataset = archived.ArchivedDataset(
            pairs,
            Path(args.root),
            model.views,
            getattr(model, "tokenizer", None),
            model.image_size,
        )
        return archived.ArchivedLoader(
            dataset, args.batch_size, args.workers, self.device, args.seed
        )

    def compile(self):
        """Compiles as main.py does; returns the outcome in words."""
        args, t = self.args, self.training
        shape = args.batch_size, self.device
        extra = contrast.extra_views(args.duplicates, *shape)
        batches = warmup.dummy_batches(self.model, *shape, extra)
        prepare = warmup.unchanged
        if not self.variant.from_files:
            batches = [self.random_views(args.batch_size)]
        elif not self.variant.is_archived:
            augments = self.open_loader().augments_on_device

            def prepare(views):
                return t.prepare(warmup.as_loaded(views, augments))

        modules = [*self.model.blocks(), *t.criterion.blocks()]
        reasons = warmup.try_compilation(t, modules, batches, args.activation_budget, prepare)
        return f"torch.compile failed: {reasons[0]}" if reasons else "compiled"

    def time_phases(self):
        """Has the training mark the watch at the end of each phase."""
        t, watch = self.training, self.watch
        # A batch is fed after the backward pass of the one before it, in the same update.
        t.prefetcher = watch.charged("data", t.prefetcher, before="backward")
        self.model.forward_features = watch.charged("forward", self.model.forward_features)
        t.criterion = watch.charged("forward", t.criterion)
        t.optimizer.register_step_pre_hook(lambda *_: watch.mark("backward"))
        t.after_update = watch.charged("optimizer", t.after_update)

    def take(self):
        """Yields the micro-batches of an update."""
        for i in range(self.training.update_freq):
            self.watch.mark("backward" if i else "data")
            batch = next(self.batches)
            self.watch.mark("data")
            yield batch

    def update(self):
        metrics = engine.update(self.training, self.take(), self.step % UPDATES)
        if self.step % self.args.print_freq == 0:
            self.meters.read()
        self.meters.update(metrics)
        self.step += 1
        if self.variant.is_archived:  # it waits for the metrics of every update
            self.meters.read()

    def round(self, updates):
        """{phase: seconds per update}, and "samples/s"; one more update at the start allocates."""
        self.update()
        self.watch.seconds()
        started = time.perf_counter()
        self.watch.mark("start")
        for _ in range(updates):
            self.update()
        phases = self.watch.seconds()
        seconds = time.perf_counter() - started
        self.free()
        samples = updates * self.args.batch_size * self.training.update_freq
        return {k: v / updates for k, v in phases.items()} | {"samples/s": samples / seconds}

    def free(self):
        """Leaves the GPU's memory to the other variants, but for weights and moments."""
        self.training.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self):
        """Peak GB, allocated on a GPU, otherwise of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def facts(self):
        return {"gflop": self.gflop, "notes": self.notes, "GB": self.memory(), **self.limits}


MEASURED = None  # this process's training: a pool's functions share no other state between calls


def start(variant):
    global MEASURED
    MEASURED = MeasuredTraining(variant)


def call(method, *args):
    return getattr(MEASURED, method)(*args)


# ---------------------------------------------------------------------------------------------
# step, train


def variants_of(options, flags):
    """{name: Variant}; flags are main.py's."""
    common = options.command == "train", options.caption_tokens
    variants = {"this code": Variant(flags, *common)}
    for other in options.against:
        variants[other] = Variant([*flags, *shlex.split(other)], *common)
    if options.paper:
        args = main_script.get_args_parser().parse_args(flags)
        is_half = torch.cuda.is_available() and args.precision not in ("fp32", "tf32")
        precision = ["--precision", "fp16"] if is_half else []
        flags = [*flags, *archived.FLAGS, *precision]
        variants["--paper"] = Variant(
            flags, common[0], SLIP_PREPROCESSING.context_length, is_archived=True
        )
    return variants


def with_pictures(flags, number, folder):
    """The flags, with those of a dataset of pictures that is written to the folder."""
    write_pictures(Path(folder), number, zips=0)
    metadata = os.path.join(folder, "pairs.csv")
    return [*flags, "--dataset", "csv", "--root", folder, "--metadata", metadata]


def measure(variants, updates, rounds):
    """{name: its figures}, with a process for each variant and all measured in turn."""
    with ExitStack() as stack:
        pools, results = {}, {name: [] for name in variants}
        for name, variant in variants.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            pools[name].submit(start, variant).result()
        for _ in range(rounds + 1):  # the first warms up
            for name, pool in pools.items():
                results[name].append(pool.submit(call, "round", updates).result())
        facts = {name: pool.submit(call, "facts").result() for name, pool in pools.items()}
    return {name: summarize(results[name][1:], facts[name]) for name in variants}


@contextmanager
def environment(variables):
    """Sets environment variables for the processes that are started within."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def summarize(rounds, facts):
    """Medians of the rounds, the facts, and the rate of arithmetic that follows from both, also in
    percent of that of products of matrices."""
    result = {key: median(r[key] for r in rounds) for key in rounds[0]}
    rate = result["samples/s"] * facts["gflop"] / 1e3  # TFLOP/s
    percents = {f"percent of {key}": 100 * rate / facts[key] for key in ("matrices", "sustained")}
    return {**result, **facts, "TFLOP/s": rate, **percents}


def print_training(results, options, flags):
    args, first = main_script.get_args_parser().parse_args(flags), results["this code"]
    images = "JPEG files" if options.command == "train" else "synthetic batches"
    print(f"{options.command}: {args.model}, {args.batch_size} x {args.update_freq} {images}")
    print(f"{machine()}")
    print(f"captions of {options.caption_tokens} tokens; median of {options.rounds} rounds\n")
    head = ["samples/s", "ratio", "ms/update", *PHASES, "GFLOP", "TFLOP/s"]
    head += ["%rate", "%lasting", "GB"]
    width = max(map(len, results))
    print(" " * width + "".join(f"{name:>10}" for name in head))
    for name, r in results.items():
        ms = [1e3 * r[phase] for phase in PHASES]
        row = [r["samples/s"], first["samples/s"] / r["samples/s"], sum(ms), *ms]
        row += [r["gflop"], r["TFLOP/s"], r["percent of matrices"]]
        row += [r["percent of sustained"], r["GB"]]
        digits = [2, 2, *[0] * 5, 1, 3, 1, 1, 2]
        print(f"{name:{width}}" + "".join(f"{x:10.{d}f}" for x, d in zip(row, digits, strict=True)))
    print()
    for name, r in results.items():
        print(f"{name}: {', '.join(r['notes'])}; this machine multiplies matrices in that")
        print(f"  precision at {r['matrices']:.3f} TFLOP/s, lasting at {r['sustained']:.3f}, and")
        print(f"  copies at {r['copy']:.1f} GB/s")


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


def benchmark_training(options, flags):
    """A row of figures per variant; flags are main.py's."""
    main_script.get_args_parser().parse_args(flags)  # wrong flags stop before anything is written
    malloc = {} if options.default_malloc else KEEP_MEMORY
    with tempfile.TemporaryDirectory() as folder, environment(malloc):
        if options.command == "train" and "--root" not in flags:
            flags = with_pictures(flags, options.samples, folder)
        results = measure(variants_of(options, flags), options.updates, options.rounds)
    print_training(results, options, flags)
    if options.save:
        folder = utils.make_folder(options.save)
        settings = {"machine": machine(), "flags": flags}
        utils.write_json(folder / f"{options.command}.json", {**settings, "results": results})
        draw(results, folder / f"{options.command}.png")
