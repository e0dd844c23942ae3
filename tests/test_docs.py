"""The pages: every command of ours in them is one that its script takes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import benchmark
import captions
import eval_retrieval
import eval_zeroshot
import export
import main
import main_finetune
import main_linear
import make_dataset
import models
import optimization
import report
import run_with_submitit
from utils import InputError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = (benchmark, eval_retrieval, eval_zeroshot, export, main, main_finetune, main_linear)
SCRIPTS = {s.__name__: s for s in (*SCRIPTS, make_dataset, report, run_with_submitit)}
COMMAND = re.compile(r"\b(?:python|torchrun)3?(?: -\S+(?: \d+)?)* (\w+)\.py((?: [^\n`]*)?)")
OWN = ROOT / "docs/from_open_clip.md"


def commands_of(text):
    """(script, words) of each command of ours; a command with dots leaves out required flags.

    A page may define NAME="the beginning of a command", and go on with $NAME.
    """
    text = text.replace("\\\n", " ")
    for whole, name, value in re.findall(r'^( *([A-Z]+)="([^"]*)")', text, re.MULTILINE):
        text = text.replace(whole, "").replace(f"${name} ", f"{value} ")
    for name, words in COMMAND.findall(text):
        yield name, shlex.split(words, comments=True)


def parse(name, words):
    """The flags as the script parses them. Raises InputError for those it does not have."""
    parser, script = SCRIPTS[name].get_args_parser(), SCRIPTS[name]
    words = [word for word in words if word not in ("...", "--help")]
    if script not in (benchmark, run_with_submitit):
        return parser.parse_args(words)
    args, rest = parser.parse_known_args(words)
    return SCRIPTS[getattr(args, "script", "main")].get_args_parser().parse_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page):
    for name, words in commands_of(page.read_text(encoding="utf-8")):
        try:
            args = parse(name, words)
        except InputError as error:
            is_part = words and words[-1] in ("...", "--help")
            if is_part and "are required" in str(error):
                continue
            raise AssertionError(f"{name}.py {shlex.join(words)}: {error}") from error
        if name == "main":
            models.parse_name(args.model)
            assert args.dataset in captions.SOURCES and args.warmup_epochs <= args.epochs


def test_open_clips_recipes_are_commands_of_ours():
    commands = list(commands_of(OWN.read_text(encoding="utf-8")))
    assert sum(name == "main" for name, _ in commands) >= 6
    assert {"eval_zeroshot", "export", "run_with_submitit"} <= {name for name, _ in commands}


def test_a_command_with_a_flag_that_is_not_there_is_noticed():
    page = (
        "    torchrun --nproc-per-node 8 main.py --model CLIP_RN50 \\\n  --warmup 10000 # steps\n"
    )
    ((name, words),) = commands_of(page)
    assert (name, words) == ("main", ["--model", "CLIP_RN50", "--warmup", "10000"])
    with pytest.raises(InputError, match="unrecognized arguments: --warmup 10000"):
        parse(name, words)


def test_the_flags_that_are_set_beside_open_clips_are_ours():
    parsers = [script.get_args_parser() for script in SCRIPTS.values()]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", OWN.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [theirs if ours.startswith("the same") else ours for theirs, ours in rows]
    flags = {flag for cell in cells for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", cell)}
    assert len(flags) > 30 and flags <= known


def test_class_names_and_prompts_of_imagenet_are_open_clips():
    import open_clip

    labels, templates = (
        json.loads((ROOT / f).read_text()) for f in ("labels.json", "templates.json")
    )
    assert labels["imagenet"] == list(open_clip.IMAGENET_CLASSNAMES)
    theirs = [template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [prompt.format("dog") for prompt in templates["imagenet80"]] == theirs


def test_the_schedule_of_datacomps_recipes_is_open_clips():
    """Of samples, not epochs: warm-up for 500 updates, then half a cosine down to 0."""
    recipes = [words for _, words in commands_of(OWN.read_text()) if "--dataset-resampled" in words]
    for words, samples in zip(recipes, (12_800_000, 128_000_000), strict=True):
        args = parse("main", words)
        updates = args.train_num_samples // (8 * args.batch_size)
        span = args.lr, args.lr_end, args.epochs, updates, args.warmup_epochs, args.lr_start
        step, total = np.arange(samples // 4096), samples // 4096
        cosine = 0.5 * (1 + np.cos(np.pi * (step - 500) / (total - 500)))
        theirs = 5e-4 * np.where(step < 500, (step + 1) / 500, cosine)
        np.testing.assert_allclose(optimization.cosine_scheduler(*span), theirs, rtol=1e-9)
