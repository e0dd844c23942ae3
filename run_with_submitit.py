"""Runs any script of this repository as a Slurm job through submitit.

    python run_with_submitit.py --script main --nodes 8 --ngpus 8 --shared_dir /shared/$USER/slip \\
        --dataset yfcc15m --root YFCC --metadata yfcc15m.pkl --model SLIP_VITB16
    python run_with_submitit.py --ngpus 0 --nodes 1 --tasks-per-node 2 --cpus 4 ...  # no GPUs

Unknown flags are passed to the script. A job that is preempted or reaches --timeout is queued
again and resumes from the last checkpoint in its folder; `scancel JOB` ends it for good.
"""

import argparse
import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import submitit
from submitit.slurm.slurm import SlurmJobEnvironment

import utils
from infra.distributed import run_script

REPOSITORY = str(Path(__file__).resolve().parent)

# Cores beside the loader's workers: training, autograd, pinning of batches, gloo and NCCL.
THREADS = 4

MAX_TIMEOUTS = 30  # of a job, as in the archived code; preemptions do not count

# Options of sbatch that have a flag here, as srun or submitit needs them too, or that are fixed.
OWN = ["time", "nodes", "ntasks_per_node", "cpus_per_task"]
OWN += ["signal", "output", "error", "open_mode", "array"]

OPTION = "another option of sbatch; may be repeated"


def option(text):
    """An argparse type for sbatch's options: "key=value" -> (key, value), "key" -> (key, True)."""
    match = re.fullmatch(r"([a-z][a-z0-9_-]*)(=\S.*)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} must be key=value, as in nice=100, or a key")
    key = match[1].replace("-", "_")
    if key in OWN:
        raise argparse.ArgumentTypeError(f"{text!r} has a flag of its own or is fixed; see --help")
    return key, match[2][1:] if match[2] else True


def get_args_parser():
    parser = utils.ArgumentParser("run_with_submitit.py", "Runs a script as a Slurm job")
    add = parser.add_argument
    add("--script", default="main", help="name of the script, without .py")
    add("--ngpus", default=8, type=utils.natural, help="GPUs per node; 0 if there are none")
    add("--nodes", default=8, type=utils.positive_int, help="machines")
    add("--tasks-per-node", type=utils.positive_int, help="ranks; by default one per GPU, or 1")
    add("--cpus", type=utils.positive_int, help=f"cores per task; by default workers + {THREADS}")
    add("--mem", type=utils.positive, help="memory in GB per node; by default the cluster's")
    add("-t", "--timeout", default=4320, type=utils.positive_int, help="minutes")
    add("--partition", help="Slurm's partition; by default the cluster's")
    add("--constraint", help="features of the nodes")
    add(
        "--use_volta32",
        dest="constraint",
        action="store_const",
        const="volta32gb",
        help="the same as --constraint volta32gb",
    )
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--comment", help="comment that squeue shows")
    add("--slurm", default=[], action="append", type=option, metavar="KEY=VALUE", help=OPTION)
    add("--shared_dir", default="runs", help="folder on storage that all nodes share")
    add("--job_dir", help="folder of the job, %%j is its id; by default SHARED_DIR/%%j")
    add("--cluster", choices=("slurm", "local"), help="by default slurm if present")
    return parser


def parse(script, job_dir, argv):
    """The script's parsed flags. The user's own --output-dir or --name overrides job_dir."""
    parser = script.get_args_parser()
    options = parser.parse_args(["--output-dir", job_dir, *argv])
    is_named = "logs" in options and options.name is not None  # --name is another flag elsewhere
    return parser.parse_args(argv) if is_named else options


def requeue_when_preempted():
    """Makes SIGTERM queue this job again, as submitit's own signal does, if the job is RUNNING.

    If a preemption has a grace time, Slurm announces it by SIGTERM alone and does not requeue a job
    that ends within that time. SIGTERM also reaches jobs that were cancelled or requeued by others,
    but these are no longer RUNNING.
    """
    environment = SlurmJobEnvironment()
    requeue = signal.getsignal(environment._usr_sig())
    bypass = signal.getsignal(signal.SIGTERM)

    def handle(signum, frame):
        is_first = environment.global_rank == 0
        is_free = is_first and state_of(environment.job_id) == "RUNNING"
        (requeue if is_free else bypass)(signum, frame)

    signal.signal(signal.SIGTERM, handle)


def state_of(job_id):
    """The job's state in Slurm's words, such as "RUNNING"; "" if Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Job:
    """The function of every task. submitit pickles it and submits it again after a preemption."""

    def __init__(self, script, argv, job_dir):
        self.script, self.argv, self.job_dir = script, argv, job_dir

    def __call__(self):
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        if SlurmJobEnvironment().activated():
            requeue_when_preempted()
        sys.path.insert(0, REPOSITORY)
        from infra import distributed  # not before: submitit loads this class from elsewhere

        script = importlib.import_module(self.script)
        job_dir = self.job_dir.replace("%j", submitit.JobEnvironment().job_id)
        distributed.run_script(lambda: script.main(parse(script, job_dir, self.argv)))

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(self)


def main(args, argv):
    if not (Path(REPOSITORY) / f"{args.script}.py").exists():
        raise utils.InputError(f"--script {args.script}: no such script; give a name such as main")
    job_dir = args.job_dir or f"{args.shared_dir}/%j"

    # Wrong flags stop before queueing.
    options = parse(importlib.import_module(args.script), job_dir, argv)
    cpus = args.cpus or options.workers + THREADS

    try:
        executor = open_executor(job_dir, cpus, args)
        job = executor.submit(Job(args.script, argv, str(Path(job_dir).absolute())))
    except (ValueError, RuntimeError) as error:  # submitit's, with Slurm's message
        raise utils.InputError(f"the job was not submitted: {error}") from error
    print(f"submitted job {job.job_id}; its logs and checkpoints are in {job.paths.folder}")
    return job


def open_executor(job_dir, cpus, args):
    executor = submitit.AutoExecutor(
        folder=job_dir, cluster=args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS
    )
    executor.update_parameters(
        name=args.script,
        nodes=args.nodes,
        tasks_per_node=args.tasks_per_node or max(args.ngpus, 1),
        cpus_per_task=cpus,
        timeout_min=args.timeout,
    )
    optional = {
        "gpus_per_node": args.ngpus or None,  # a cluster without GPUs refuses even 0 of them
        "mem_gb": args.mem,
        "slurm_partition": args.partition,
        "slurm_constraint": args.constraint,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_comment": args.comment,
    }
    executor.update_parameters(**{k: v for k, v in optional.items() if v is not None})
    executor.update_parameters(
        slurm_signal_delay_s=120,
        # submitit listens to the signal that the environment names; it must be the job's own.
        slurm_setup=[f"export SUBMITIT_PREEMPT_SIGNAL={SlurmJobEnvironment.USR_SIG}"],
        # srun no longer inherits --cpus-per-task from sbatch. If one task dies, all must end.
        slurm_srun_args=[f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        # On some clusters Slurm requeues only jobs that ask for it.
        slurm_additional_parameters={"requeue": True, **dict(args.slurm)},
    )
    return executor


if __name__ == "__main__":
    run_script(lambda: main(*get_args_parser().parse_known_args()))
