"""A throwaway Slurm on loopback: real controller, several nodes on one host, pretended GPUs; no cgroups.

    with SlurmLab(Path("/tmp/lab")) as lab:
        lab.run("sbatch", "--gres=gpu:2", "job.sh")

Installs Debian's slurm-wlm and munge where it runs as root. Every daemon is a child that dies with this process; `stop` also ends what the jobs left behind.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import debian

CONF = """\
ClusterName={cluster}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters={communication}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
PlugStackConfig={root}/plugstack.conf
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_yield_interval=1000000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
KillWait=10
CompleteWait=0
MinJobAge=300
EnforcePartLimits=ALL
GresTypes=gpu
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=7-0 DefaultTime=60
PartitionName=preempt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE MaxTime=7-0 DefaultTime=60
PartitionName=short Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=10
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=192 Boards=1 "
    "SocketsPerBoard=2 CoresPerSocket=96 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:{gpus} Feature=h100 State=UNKNOWN\n"
)


class LabMissingError(RuntimeError):
    """Slurm is not here and cannot be installed; the message says what is missing."""


def install() -> None:
    """Install slurm-wlm and munge from Debian when root; their system services are not started."""
    if all(shutil.which(tool, path=_path()) for tool in ("slurmctld", "slurmd", "sbatch", "munged", "setpriv")):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabMissingError("no Slurm here: install slurm-wlm and munge, or run as root on Debian")
    packages = ("slurm-wlm", "munge", "util-linux")
    try:
        debian.install(*packages)
    except subprocess.CalledProcessError as error:
        raise LabMissingError(f"apt-get could not install {' '.join(packages)}: {error}") from error


class SlurmLab:
    """One cluster below `root` (a short path without blanks)."""

    def __init__(self, root: Path, *, nodes: int = 3, gpus: int = 8, cluster: str = "lab") -> None:
        self.root, self.gpus, self.cluster = root.resolve(), gpus, cluster
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.conf = self.root / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmLab:
        install()
        self._configure()
        self._start("munged", "--foreground", f"--socket={self.root}/munge.sock", "--num-threads=2",
                    f"--key-file={self.root}/munge/key", f"--seed-file={self.root}/munge/seed",
                    f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/log/munged")  # fmt: skip
        wait_until(lambda: (self.root / "munge.sock").exists(), 10, "munged's socket")
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in reversed(list(self._daemons)):
            self._stop(name, signal.SIGTERM)
        self._kill_leftovers()

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        """Run one of Slurm's commands against this cluster; return its output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands reach this cluster."""
        return os.environ | {"SLURM_CONF": str(self.conf), "PATH": _path()}

    def start_controller(self) -> None:
        """Start the controller; returns when it answers."""
        self._start("slurmctld", "-D", "-f", str(self.conf))
        wait_until(lambda: "UP" in self.run("scontrol", "ping", check=False), 20, "slurmctld")

    def stop_controller(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop the controller; jobs run on."""
        self._stop("slurmctld", how)

    def start_node(self, name: str) -> None:
        """Start the node's daemon."""
        (self.root / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill the node's daemon hard: after SlurmdTimeout (10 s) the controller calls it down."""
        self._stop(name, signal.SIGKILL)

    def wait_idle(self) -> None:
        """Wait until every node is up and free."""
        self.run("scontrol", "update", f"nodename={','.join(self.nodes)}", "state=resume", check=False)
        wait_until(
            lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()) == {"idle"},
            40,
            "nodes",
        )

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left."""
        active = ("squeue", "-h", "-t", "PD,R,CF,S,ST,SO", "-o", "%A")
        if jobs := self.run(*active, check=False).split():
            self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        wait_until(lambda: not self.run(*active, check=False), 30, "jobs to leave")

    def _configure(self) -> None:
        for folder in ("state", "spool", "log", "munge", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        key = self.root / "munge" / "key"
        (self.root / "munge").chmod(0o700)
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for number in range(self.gpus):
            device = self.root / "dev" / f"nvidia{number}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")  # a link to a character device is enough; a bare count is not
        ports = free_ports(len(self.nodes) + 1)
        # listen on loopback alone where this host's own name is a loopback address; munge guards it elsewhere
        quiet = socket.gethostbyname(socket.gethostname()).startswith("127.")
        text = CONF.format(cluster=self.cluster, port=ports[0], user=getpass.getuser(), root=self.root,
                           communication="NoInAddrAny,NoCtldInAddrAny" if quiet else "")  # fmt: skip
        nodes = [NODE.format(name=n, port=p, gpus=self.gpus) for n, p in zip(self.nodes, ports[1:], strict=True)]
        head, partitions = text.split("PartitionName", 1)
        self.conf.write_text(head + "".join(nodes) + "PartitionName" + partitions)
        names = ",".join(self.nodes)
        devices = f"{self.root}/dev/nvidia[0-{self.gpus - 1}]"
        (self.root / "gres.conf").write_text(f"NodeName={names} Name=gpu Type=h100 File={devices}\n")
        (self.root / "plugstack.conf").touch()
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _start(self, name: str, *arguments: str) -> None:
        program = name if name in ("munged", "slurmctld") else arguments[0]
        rest = arguments if program == name else arguments[1:]
        with (self.root / "log" / name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "TERM", program, *rest),
                env=self.env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _stop(self, name: str, how: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(how)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _kill_leftovers(self) -> None:
        """Kill what jobs of this cluster left: Slurm sets SLURM_CONF and SLURM_JOB_ID in each of them."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes().split(b"\0")
                steps = (folder / "exe").readlink().name.startswith("slurmstepd")
            except OSError:
                continue
            ours = f"SLURM_CONF={self.conf}".encode() in environ
            if ours and (steps or any(entry.startswith(b"SLURM_JOB_ID=") for entry in environ)):
                os.kill(int(folder.name), signal.SIGKILL)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for `condition`, at most `seconds`; a TimeoutError names what did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds} s")
        time.sleep(0.05)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range, so that no outgoing connection takes one meanwhile."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found
