"""A Slurm of two nodes on this machine, in the foreground and in a folder of its own: Debian's slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where daemons are, for everybody
NODES = ("n1", "n2")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=100000
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
  """What keeps a cluster from being started here; "" where nothing does."""
  absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
  if absent:
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
  return "" if os.geteuid() == 0 else "Slurm's daemons want root here"


class Cluster:
  """Two nodes of one host; `kill` takes one away with everything that runs on it, as a power cut does."""

  def __init__(self, folder: Path, cpus: int = 2) -> None:
    self.folder = folder
    self.daemons: dict[str, subprocess.Popen[bytes]] = {}
    for name in ("state", *(f"spool-{node}" for node in NODES)):
      (folder / name).mkdir()
    ports = _free_ports(3)
    user, host = getpass.getuser(), socket.gethostname()
    nodes = "\n".join(
      f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
      for node, port in zip(NODES, ports[1:], strict=True)
    )
    self.conf = folder / "slurm.conf"
    self.conf.write_text(CONF.format(host=host, ports=ports, user=user, folder=folder, nodes=nodes))
    self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}

  def start(self) -> None:
    key = self.folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    self._daemon(
      "munged",
      *("--foreground", "--force", f"--key-file={key}", f"--socket={files['socket']}"),
      *(f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}"),
    )
    until(lambda: Path(files["socket"]).exists(), 20, "munged opens its socket")
    self._daemon("slurmctld", "-D", "-f", str(self.conf))
    for node in NODES:
      self.join(node)
    until(lambda: self.states() == dict.fromkeys(NODES, "IDLE"), 60, "both nodes are idle")

  def join(self, node: str) -> None:
    self._daemon(node, "-D", "-f", str(self.conf), "-N", node, program="slurmd")

  def kill(self, node: str) -> None:
    """SIGKILL to the node's daemon, to its steps and to all that they started."""
    daemon = self.daemons.pop(node)
    steps = [pid for pid in _processes() if _variable(pid, "SLURMD_NODENAME") == node]
    managers = [pid for pid in _processes() if _is_manager(pid, node, self.folder)]
    for pid in (daemon.pid, *managers, *steps):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    daemon.wait()

  def states(self) -> dict[str, str]:
    """{node: its state}; those that the controller does not answer for are left out."""
    said = self.run("scontrol", "show", "nodes", "-o", check=False)
    pairs = re.findall(r"NodeName=(\S+).*? State=([A-Z]+\*?)", said)
    return {node: state for node, state in pairs if node in NODES}

  def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
    done = subprocess.run(
      command, env=self.environment, capture_output=True, text=True, timeout=60, cwd=cwd
    )
    if check and done.returncode:
      raise RuntimeError(f"{command}: {done.stderr}")
    return done.stdout

  def jobs(self) -> dict[str, dict[str, str]]:
    """{job, or array_task: its fields}, as `scontrol show job` has them."""
    rows = {}
    for line in self.run("scontrol", "show", "jobs", "-o", check=False).splitlines():
      row = dict(pair.partition("=")[::2] for pair in line.split() if "=" in pair)
      if "JobId" in row:
        task = row.get("ArrayTaskId")
        rows[f"{row['ArrayJobId']}_{task}" if task else row["JobId"]] = row
    return rows

  def close(self) -> None:
    self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
    for node in NODES:
      if node in self.daemons:
        self.kill(node)
    for daemon in self.daemons.values():
      daemon.kill()
      daemon.wait()

  def _daemon(self, name: str, *arguments: str, program: str = "") -> None:
    path = shutil.which(program or name, path=PATH)
    assert path is not None
    with (self.folder / f"{name}.out").open("ab") as out:
      self.daemons[name] = subprocess.Popen(
        [path, *arguments], stdout=out, stderr=out, env=self.environment, start_new_session=True
      )


@contextlib.contextmanager
def started(folder: Path, cpus: int = 2) -> Generator[Cluster]:
  cluster = Cluster(folder, cpus)
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.close()


def until(is_so, seconds: float, what: str) -> None:
  deadline = time.monotonic() + seconds
  while not is_so():
    if time.monotonic() > deadline:
      raise TimeoutError(f"not within {seconds} s: {what}")
    time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for s in sockets:
      s.bind(("127.0.0.1", 0))
    return [s.getsockname()[1] for s in sockets]


def _processes() -> list[int]:
  return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]


def _variable(pid: int, name: str) -> str:
  with contextlib.suppress(OSError):
    for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
      if pair.startswith(f"{name}=".encode()):
        return pair.decode().partition("=")[2]
  return ""


def _is_manager(pid: int, node: str, folder: Path) -> bool:
  """Whether it is slurmstepd of a job on that node of this cluster: its open files are in the node's spool."""
  with contextlib.suppress(OSError):
    if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd":
      links = Path(f"/proc/{pid}/fd").iterdir()
      return any(os.readlink(link).startswith(f"{folder}/slurmd-{node}.log") for link in links)
  return False
