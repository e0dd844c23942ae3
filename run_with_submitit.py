"""Runs any script of this repository as a Slurm job through submitit.

    python run_with_submitit.py --script main --nodes 8 --ngpus 8 --shared_dir /shared/$USER/slip \\
        --dataset yfcc15m --root YFCC --metadata yfcc15m.pkl --model SLIP_VITB16

Flags it does not know go to the script. A job that is preempted or reaches --timeout is queued
again, and goes on from the last checkpoint in its folder.
"""

import importlib
import sys
from pathlib import Path

import submitit

import utils

REPOSITORY = str(Path(__file__).resolve().parent)


def get_args_parser():
    parser = utils.ArgumentParser("run_with_submitit.py", "Runs a script as a Slurm job")
    parser.add_argument("--script", default="main", help="script to run, without .py")
    parser.add_argument(
        "--ngpus", default=8, type=utils.natural, help="GPUs, and as many tasks, per node"
    )
    parser.add_argument("--nodes", default=8, type=utils.positive_int)
    parser.add_argument("-t", "--timeout", default=4320, type=utils.positive_int, help="minutes")
    parser.add_argument("--partition", help="Slurm partition (default: the cluster's)")
    parser.add_argument("--comment", help="shown by squeue")
    parser.add_argument("--shared_dir", default="runs", help="folder that all nodes see")
    parser.add_argument("--job_dir", help="folder of the job; SHARED_DIR/%%j (its id) if not given")
    parser.add_argument("--cluster", choices=("slurm", "local"), help="default: Slurm if present")
    return parser


def parse(script, job_dir, argv):
    """The script's flags; the user's own --output-dir comes later, and so wins."""
    return script.get_args_parser().parse_args(["--output-dir", job_dir, *argv])


class Job:
    """What each task runs; submitit pickles it, and queues it again after a preemption."""

    def __init__(self, script, argv, job_dir):
        self.script, self.argv, self.job_dir = script, argv, job_dir

    def __call__(self):
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False)
        sys.path.insert(0, REPOSITORY)
        script = importlib.import_module(self.script)
        job_dir = self.job_dir.replace("%j", submitit.JobEnvironment().job_id)
        script.main(parse(script, job_dir, self.argv))

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(self)


def main(args, argv):
    if not (Path(REPOSITORY) / f"{args.script}.py").exists():
        raise utils.InputError(f"--script {args.script}: no such script; give main, for main.py")
    job_dir = args.job_dir or f"{args.shared_dir}/%j"

    parse(importlib.import_module(args.script), job_dir, argv)  # tell wrong flags before queueing

    executor = submitit.AutoExecutor(folder=job_dir, cluster=args.cluster)
    executor.update_parameters(
        name=args.script,
        nodes=args.nodes,
        gpus_per_node=args.ngpus,
        tasks_per_node=max(args.ngpus, 1),
        cpus_per_task=10,
        timeout_min=args.timeout,
    )
    slurm = {"partition": args.partition, "comment": args.comment, "signal_delay_s": 120}
    given = {f"slurm_{key}": value for key, value in slurm.items() if value is not None}
    executor.update_parameters(**given)
    job = executor.submit(Job(args.script, argv, str(Path(job_dir).absolute())))
    print(f"submitted job {job.job_id}; its logs and checkpoints are in {job.paths.folder}")
    return job


if __name__ == "__main__":
    utils.run(lambda: main(*get_args_parser().parse_known_args()))
