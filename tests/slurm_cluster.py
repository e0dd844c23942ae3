"""A Slurm cluster on this one machine, for tests. Needs root and Debian's slurm-wlm and munge.

    python3 tests/slurm_cluster.py start DIR && export SLURM_CONF=DIR/slurm.conf
    python3 tests/slurm_cluster.py stop DIR

Keys, sockets, state and logs are in DIR, which can be deleted after stop; /etc stays untouched.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they are stopped

# The node claims four CPUs, so that jobs of two tasks fit on any machine. The scheduler runs every
# second, only jobs that ask for it are requeued, and jobs of "urgent" preempt those of "tests".
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munged.socket
CredType=cred/munge
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
FirstJobId={first_job}
JobRequeue=0
KillWait=30
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run(*command, folder, check=False):
    """Returns the output of a command. With check, this script ends if the command fails."""
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not installed; install slurm-wlm and munge") from None
    if check and done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def configure(folder):
    """Writes slurm.conf and munge's key."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # munged refuses a socket that others cannot reach
    key = folder / "munged.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    controller_port, node_port = free_ports(2)
    # The ranks' port follows from the job's id, so two clusters on a machine need different ids.
    values = {"first_job": secrets.randbelow(10**6) + 1, "host": socket.gethostname().split(".")[0]}
    text = CONFIG.format(
        folder=folder, controller_port=controller_port, node_port=node_port, **values
    )
    (folder / "slurm.conf").write_text(text.lstrip())


def start(folder):
    if any(process_id(folder, daemon) for daemon in DAEMONS):
        raise SystemExit(f"a cluster already runs in {folder}; stop it first")
    configure(folder)
    try:
        start_daemons(folder)
    except BaseException:
        stop(folder)
        raise
    print(f"export SLURM_CONF={folder}/slurm.conf")


def start_daemons(folder):
    flags = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    flags |= {"log-file": "log"}
    munge = [f"--{flag}={folder}/munged.{suffix}" for flag, suffix in flags.items()]
    for command in (["munged", *munge], ["slurmctld", "-c"], ["slurmd"]):
        run(*command, folder=folder, check=True)
    if not wait_for(lambda: run("sinfo", "-h", "-o", "%T", folder=folder) == "idle", 30):
        raise SystemExit(f"the node is not idle after 30 seconds; see {folder}/slurm*.log")


def process_id(folder, daemon):
    """The process id of a daemon; None if it does not run."""
    with suppress(OSError, ValueError):
        pid = int((folder / f"{daemon}.pid").read_text())
        if daemon in Path(f"/proc/{pid}/cmdline").read_text():  # empty if it has ended
            return pid
    return None


def stop(folder):
    """Ends jobs and daemons, even if the cluster started only in part."""
    if process_id(folder, "slurmctld"):
        run("scancel", "--user=root", "--full", "--signal=KILL", folder=folder)
        run("scancel", "--user=root", folder=folder)
        wait_for(lambda: not run("squeue", "-h", folder=folder), 15)
    for daemon in DAEMONS:
        end(folder, daemon)


def end(folder, daemon):
    for kind in (signal.SIGTERM, signal.SIGKILL):
        pid = process_id(folder, daemon)
        if pid:
            os.kill(pid, kind)
            wait_for(lambda: not process_id(folder, daemon), 10)


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin"  # the daemons' folder
    {"start": start, "stop": stop}[sys.argv[1]](Path(sys.argv[2]).resolve())
