"""Measures speed and memory. If a command compares variants, it measures them in turn.

    python benchmark.py step --model SLIP_VITB16 --batch-size 256 --paper  # synthetic batches
    python benchmark.py train --model SLIP_VITB16 --workers 14 --paper     # from JPEG files
    python benchmark.py memory --model SLIP_VITB16 --batch-size 256  # GB, without a GPU
    python benchmark.py save --model SLIP_VITB16  # time that training waits for a checkpoint
    torchrun --nproc-per-node 2 benchmark.py agreement  # time that ranks spend on agreeing
    python benchmark.py data        # samples per second and core: archived code and ours
    python benchmark.py shards      # tar shards: index, orders of reading, beside webdataset
    python benchmark.py workers     # memory of a loader's worker, beside webdataset
    python benchmark.py augment     # kernels, bytes and time of a view with --augment device
    python benchmark.py classifier  # prompts to a zero-shot classifier
    python benchmark.py features    # memory of classifiers on ImageNet-sized features
    python benchmark.py logistic    # time of a fit, and its distance from the optimum
    python benchmark.py open        # metadata of 15 million pairs: conversion, opening, memory
    python benchmark.py growth      # conversions and checks at 1, 4 and 16 times the input

`step`, `train` and `memory` take the flags of main.py as well. --paper also measures the archived
code's way to train, on today's libraries; --against "FLAGS" the same run with other flags.
"""

from benchmarks import (
    agreement,
    augmentation,
    classifier,
    data,
    growth,
    logistic,
    memory,
    saving,
    shards,
    training,
    workers,
)
from infra.distributed import run_script
from utils import ArgumentParser, InputError, natural, number, positive, positive_int


def add_command(commands, name, description, measure):
    """Adds a subcommand; returns its add_argument."""
    command = commands.add_parser(name, description=description, help=description)
    command.set_defaults(measure=measure)
    return command.add_argument


def add_training_command(commands, name, batches):
    description = f"speed of training on {batches}; takes main.py's flags"
    add = add_command(commands, name, description, training.benchmark_training)
    add("--updates", default=10, type=positive_int, help="updates per round")
    add("--rounds", default=5, type=positive_int, help="rounds; their median counts")
    add("--caption-tokens", default=32, type=positive_int, help="tokens of a synthetic caption")
    add("--paper", action="store_true", help="also measure the archived code's way to train")
    add("--against", default=[], action="append", metavar="FLAGS", help="also measure these flags")
    add("--default-malloc", action="store_true", help="leave glibc's malloc as it is (CPU)")
    add("--save", metavar="FOLDER", help="folder for the figures as JSON and PNG")
    return add


def add_data_commands(commands):
    add = add_command(commands, "data", "samples per second and core", data.benchmark_data)
    add("--samples", default=512, type=number(int, 2 * data.BATCH), help="JPEGs per round")
    add("--workers", default=0, type=natural, help="loader processes; 0: this process loads")
    add("--rounds", default=5, type=positive_int, help="rounds; their median counts")

    description = "index of tar shards, and reading in several orders, beside webdataset"
    add = add_command(commands, "shards", description, shards.benchmark_shards)
    add("--shards", default=32, type=number(int, 4), help="shards to write")
    add("--per-shard", default=1000, type=positive_int, help="samples of a shard")
    add("--samples", default=16_000, type=positive_int, help="images read per round")
    add("--batches", default=40, type=positive_int, help="batches loaded per round")
    add("--workers", default=0, type=natural, help="loader processes; 0: this process loads")
    add("--rounds", default=3, type=positive_int, help="rounds; their median counts")
    add("--folder", help="for the shards; by default the system's temporary folder")

    description = "memory of a loader's worker, beside webdataset and the archived code"
    add = add_command(commands, "workers", description, workers.benchmark_workers)
    add("--samples", default=1000, type=positive_int, help="JPEGs to write, and those of a shard")
    add("--workers", default=2, type=positive_int, help="loader processes")
    add("--batches", default=20, type=positive_int, help="batches loaded before the measurement")
    add("--folder", help="for the files; by default the system's temporary folder")

    description = "kernels, bytes and time of a view with --augment device"
    add = add_command(commands, "augment", description, augmentation.benchmark_augment)
    add("--batch-size", default=64, type=positive_int, help="samples of the view")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: CUDA if present")
    add("--rounds", default=5, type=positive_int, help="rounds; their median counts")

    add = add_command(commands, "open", "opening of metadata, and memory", data.benchmark_open)
    add("--pairs", default=15_000_000, type=positive_int, help="pairs of image and caption")
    add("--workers", default=2, type=positive_int, help="loader processes")
    add("--reads", default=100_000, type=positive_int, help="random pairs read per worker")
    add("--folder", help="for about 6 GB of files; by default the system's temporary folder")

    description = "time of conversions and checks as their input grows"
    add = add_command(commands, "growth", description, growth.benchmark_growth)
    add("--images", default=5000, type=positive_int, help="of the smallest input")
    add("--folder", help="for files; by default the system's temporary folder")


def add_classifier_commands(commands):
    description = "speed of prompts to a zero-shot classifier"
    add = add_command(commands, "classifier", description, classifier.benchmark_classifier)
    add("--model", default="CLIP_VITB16", help="METHOD_TOWER, with text")
    add("--classes", default=1000, type=positive_int, help="classes of ImageNet")
    add("--sample", default=100, type=positive_int, help="classes measured one at a time")
    add("--rounds", default=1, type=positive_int, help="rounds; their median counts")

    description = "memory of k-NN and logistic regression"
    add = add_command(commands, "features", description, data.benchmark_features)
    add("--images", default=1_281_167, type=positive_int, help="rows of the features")
    add("--width", default=768, type=positive_int, help="columns of the features")
    add("--classes", default=1000, type=positive_int, help="classes of the labels")
    add("--queries", default=1024, type=positive_int, help="rows that k-NN classifies")
    add("--iterations", default=1, type=positive_int, help="iterations of logistic regression")
    add("--folder", help="for about 4 GB of files; by default the system's temporary folder")

    description = "logistic regression beside scikit-learn's"
    add = add_command(commands, "logistic", description, logistic.benchmark_logistic)
    add("--images", default=10_000, type=positive_int, help="rows of the features")
    add("--width", default=384, type=positive_int, help="columns of the features")
    add("--classes", default=100, type=positive_int, help="classes of the labels")
    add("--c", default=[0.01, 1.0, 100.0], nargs="+", type=positive, help="of the regularisation")
    add("--rounds", default=3, type=positive_int, help="rounds; their median counts")


def get_args_parser():
    parser = ArgumentParser("benchmark.py", "Measures speed and memory")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add_training_command(commands, "step", "synthetic batches")
    add = add_training_command(commands, "train", "image files")
    add("--samples", default=2048, type=positive_int, help="JPEGs to write, unless --root is given")

    description = "GPU memory of a training, computed without a GPU; takes main.py's flags"
    add_command(commands, "memory", description, memory.benchmark_memory)

    description = "time that training waits for a checkpoint"
    add = add_command(commands, "save", description, saving.benchmark_save)
    add("--model", default="SLIP_VITB16", help="METHOD_TOWER")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: CUDA if present")
    add("--rounds", default=3, type=positive_int, help="checkpoints to save")
    add("--folder", help="for the checkpoints; by default the system's temporary folder")

    description = "microseconds that ranks spend on agreeing on signals"
    add = add_command(commands, "agreement", description, agreement.benchmark_agreement)
    add("--micro-batches", default=160, type=number(int, 16), help="per round")
    add("--rounds", default=5, type=positive_int, help="rounds; their median counts")

    add_data_commands(commands)
    add_classifier_commands(commands)
    return parser


def main(args, flags):
    """flags: those that are not this script's own; some commands read them as main.py's."""
    if args.measure in (training.benchmark_training, memory.benchmark_memory):
        return args.measure(args, flags)
    if flags:
        raise InputError(f"unknown flags {' '.join(flags)}; see benchmark.py --help")
    args.measure(args)


if __name__ == "__main__":
    run_script(lambda: main(*get_args_parser().parse_known_args()))
