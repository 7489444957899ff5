"""A real Slurm cluster on this machine, for tests: munged, slurmctld and two slurmd whose GPUs are plain files.

    with cluster(folder) as slurm:
        slurm.run("sbatch", "--wrap", "hostname")

Needs root and Debian's slurm-wlm and munge (installed if absent). Both nodes are this machine: a job really runs, is killed, requeued and
accounted for by the daemons a site runs, but shares the cores with the tests.
"""

import os
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

NODES = {"n1": "red", "n2": "blue"}
"""Each with its kind of GPU."""
GPUS = 4

SLURM_CONF = """
ClusterName=refdpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/no-gpus
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
MinJobAge=3600
KillWait=5
InactiveLimit=0
# A busy machine answers late; Slurm's own limits (10, 2, 10 seconds) would take that for a failure.
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=300
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=60 State=UP
PartitionName=other Nodes=n[1-2] MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `env` makes Slurm's commands talk to it."""

    folder: Path
    env: dict[str, str]

    def run(self, *argv: object, check: bool = True, **more) -> str:
        """Standard output of a command in the cluster's environment."""
        done = subprocess.run(
            [str(word) for word in argv],
            check=False,
            env=self.env | more.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=600,
            **more,
        )
        assert not check or done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jobs(self, job: str) -> dict[str, dict[str, str]]:
        """What scontrol knows of a job, or of every task of an array, by id (`7` or `7_3`)."""
        tasks = {}
        for line in self.run("scontrol", "show", "job", "--oneliner", job).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            task = fields.get("ArrayTaskId")
            tasks[f"{fields['ArrayJobId']}_{task}" if task else fields["JobId"]] = fields
        return tasks

    def states(self, job: str) -> dict[str, str]:
        return {name: fields["JobState"] for name, fields in self.jobs(job).items()}

    def wait(self, job: str, states: set[str], timeout: float = 600) -> dict[str, str]:
        """Wait until every task of `job` is in one of `states`; TimeoutError, with the daemons' logs, otherwise.

        A step that outlives SIGKILL by a minute takes its node out of service, and a job on two nodes would wait for ever. Slurm 22.05 was seen to
        do so once, with a step that was ended while it began. The node is put back, with a warning.
        """
        for node in self.run("sinfo", "-h", "-N", "-o", "%N", "--states=drain", "--partition=all").split():
            warnings.warn(f"Slurm took {node} out of service: {self.run('sinfo', '-R', '-h')}\n{self.log()}", stacklevel=2)
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        deadline = time.monotonic() + timeout
        while not set((now := self.states(job)).values()) <= states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{now}\n{self.run('squeue', '--array', check=False)}\n{self.log()}")
            time.sleep(0.2)
        return now

    def log(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
"""States of a job that will not run again."""


def obstacle() -> str | None:
    """Why no cluster can run here; None if one can. Installs the daemons where that is possible."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    if all(shutil.which(name) for name in DAEMONS):
        return None
    if not shutil.which("apt-get"):
        return f"no {', '.join(name for name in DAEMONS if not shutil.which(name))}, and no apt-get to install them"
    install = "apt-get -qq update && apt-get -qq install -y --no-install-recommends slurm-wlm munge"
    done = subprocess.run(
        ["bash", "-c", install],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        timeout=600,
    )
    return None if done.returncode == 0 else f"slurm-wlm and munge cannot be installed: {done.stderr.strip()[-300:]}"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start the daemons in `folder`; stop them, and every job, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munged refuses a socket in a folder others may write to
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    ports = _free_ports(1 + len(NODES))
    hostname = socket.gethostname().partition(".")[0]
    node_lines, gres_lines = [], []
    for node, port in zip(NODES, ports[1:], strict=True):
        node_lines.append(
            f"NodeName={node} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=1000000 Gres=gpu:{NODES[node]}:{GPUS} State=UNKNOWN"
        )
        for gpu in range(GPUS):
            (folder / f"{node}-gpu{gpu}").touch()
            gres_lines.append(f"NodeName={node} Name=gpu Type={NODES[node]} File={folder}/{node}-gpu{gpu}")
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=hostname, folder=folder, controller_port=ports[0], nodes="\n".join(node_lines)))
    (folder / "gres.conf").write_text("\n".join(gres_lines) + "\n")
    # Slurm names a job's GPUs, and these do not exist: a job of ours runs on the CPU on purpose.
    (folder / "no-gpus").write_text("#!/bin/sh\necho export CUDA_VISIBLE_DEVICES=\n")
    (folder / "no-gpus").chmod(0o755)
    env = os.environ | {"SLURM_CONF": str(conf)}
    slurm = Slurm(folder, env)
    daemons = []
    try:
        munge = [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid"]
        munge += [
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
            "--force",
            "--foreground",
            "--num-threads=2",
        ]
        daemons.append(_start(folder, env, "munged", *munge))
        _wait_for(lambda: (folder / "munge.socket").exists(), slurm)
        daemons.append(_start(folder, env, "slurmctld", "-D", "-f", str(conf)))
        daemons += [_start(folder, env, "slurmd", "-D", "-f", str(conf), "-N", node) for node in NODES]
        _wait_for(lambda: slurm.run("sinfo", "-h", "--partition=all", "-o", "%T %D", check=False) == f"idle {len(NODES)}", slurm)
        yield slurm
    finally:
        slurm.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root", check=False)
        slurm.run("scancel", "--user=root", check=False)
        time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _start(folder: Path, env: dict[str, str], *argv: str) -> subprocess.Popen:
    with open(folder / "daemons.log", "ab") as log:
        return subprocess.Popen(argv, env=env, stdout=log, stderr=log)


def _wait_for(ready, slurm: Slurm, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(slurm.log())
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
