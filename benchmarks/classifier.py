"""The command classifier of benchmark.py: prompts to a zero-shot classifier."""

import random
from functools import partial

import catalog
import eval_zeroshot
import models
import utils
from benchmarks.archived import build_one_by_one
from benchmarks.data import CPU, compare, machine, print_rates, timed
from evaluation import Evaluation
from infra import devices


def classes_per_second(build, model, classes, templates):
    seconds, _ = timed(lambda: build(model, classes, templates))
    return len(classes) / seconds


def benchmark_classifier(args):
    """Classes per second of the archived way and of ours.

    The archived way takes the same time for every class, so a sample of them gives its rate.
    """
    labels, templates = (
        utils.read_json(path, path)["imagenet"] for path in (catalog.LABELS, catalog.TEMPLATES)
    )
    draw = random.Random(0).sample
    classes = draw(labels, min(args.classes, len(labels)))
    sample = draw(classes, min(args.sample, len(classes)))
    print(f"classifier: {len(classes)} classes x {len(templates)} prompts, fp32 on the CPU;")
    print(f"one at a time {len(sample)} of them; {machine()}, median of {args.rounds} rounds\n")
    model = models.create_model(args.model).eval()
    evaluation = Evaluation(devices.Precision("fp32", CPU))
    build = partial(eval_zeroshot.build_classifier, evaluation=evaluation)
    runs = {"one class at a time": (build_one_by_one, sample), "this code": (build, classes)}
    for function, _ in runs.values():  # warms up
        classes_per_second(function, model, sample[:4], templates)
    calls = {
        name: partial(classes_per_second, function, model, names, templates)
        for name, (function, names) in runs.items()
    }
    rates = compare(calls, args.rounds, warm_up=0)
    print_rates(rates, "one class at a time", "classes/s")
    return rates
