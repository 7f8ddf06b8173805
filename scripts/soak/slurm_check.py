"""A batch over a Slurm of two nodes, one of which is killed: what `batch --launcher` promises, checked.

    python scripts/soak/slurm_check.py [FOLDER]

Starts munged, slurmctld and two slurmd on this machine, as root (Debian: slurmctld, slurmd, slurm-client, munge), and
ends them. Four jobs on a tiny model go out through srun; when one is under way on the second node, every process there
is killed. The batch must end with a row for it, the others done, and the code of a crash; after the node is back, a
rerun does that job alone. Takes some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from batch_check import expect, times  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
NODES = ("first", "second")
BUDGETS = (3.5, 4.5, 5.5, 6.5)
SECONDS = 600.0
MARK = "SLURM_CHECK_NODE"
"""Variable in the environment of a node's daemons; their jobs have Slurm's own with its name."""

CONFIGURATION = """
ClusterName=check
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17500
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
NodeName=first NodeHostname=localhost NodeAddr=127.0.0.1 Port=17501 CPUs=1
NodeName=second NodeHostname=localhost NodeAddr=127.0.0.1 Port=17502 CPUs=1
PartitionName=all Nodes=first,second Default=YES MaxTime=INFINITE State=UP
"""


def main(folder: Path) -> None:
    """Set up, run, kill, run again."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid():
        raise SystemExit(
            f"missing: {', '.join(missing) or 'the rights of root'}; on Debian install slurm-wlm and munge"
        )
    os.environ["PATH"] += ":/usr/sbin"
    with ExitStack() as stack:
        cluster(folder, stack)
        check(folder, prepare(folder), stack)


def cluster(folder: Path, stack: ExitStack) -> None:
    """Two nodes that are idle; their daemons end with the stack."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "state").mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    options = [f"--{name}={folder / file}" for name, file in (names | {"log-file": "munge.log"}).items()]
    stack.enter_context(daemon("munged", "--foreground", "--force", *options))
    wait("munge", (folder / "munge.socket").exists)
    stack.enter_context(daemon("slurmctld", "-D"))
    for node in NODES:
        start_node(node, stack)
    wait("two idle nodes", lambda: states() == dict.fromkeys(NODES, "idle"))


@contextmanager
def daemon(*command: str, **environment: str) -> Iterator[None]:
    """A program in the foreground of a session of its own, while the context lasts."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def start_node(node: str, stack: ExitStack) -> None:
    """A node's daemon; whatever is left of the node ends with the stack."""
    stack.callback(kill_node, node)
    stack.enter_context(daemon("slurmd", "-D", "-N", node, **{MARK: node}))


def kill_node(node: str) -> int:
    """Kill everything that runs on a node, at once; gives the number of its processes."""
    wanted = {f"{MARK}={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted & set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(found)


def states() -> dict[str, str]:
    """State by node, as sinfo has it."""
    told = subprocess.run(["sinfo", "-Nh", "-o", "%N %t"], capture_output=True, text=True, check=False).stdout
    return dict(line.split() for line in told.splitlines())


def wait(what: str, holds: Callable[[], bool]) -> None:
    """Wait for something to come about."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come about in {SECONDS:.0f} s; see the logs beside slurm.conf")
        time.sleep(0.2)


def prepare(folder: Path) -> Path:
    """A model, its text and the batch file."""
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=4000)))
    tiny_model("llama", folder / "model")
    jobs = [{"name": f"job-{number}", "target_bpw": bpw} for number, bpw in enumerate(BUDGETS)]
    defaults = {"model": str(folder / "model"), "calibration": str(folder / "text.txt"), "device": "cpu"}
    defaults |= {"group_size": 32, "num_samples": 8, "seq_len": 32, "eval_samples": 8, "bits": "3,4,8"}  # type: ignore[dict-item]
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), "defaults": defaults, "jobs": jobs}))
    return path


def check(folder: Path, jobs: Path, stack: ExitStack) -> None:
    """Run the batch, kill a node in the middle of a job, run it again."""
    runs, launcher = folder / "runs", "srun --nodes 1 --ntasks 1 --"
    command = [sys.executable, "-m", "hawqtool", "batch", str(jobs), "--jobs", "4", "--launcher", launcher]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HAWQTOOL_LOAD_TRIAL": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as first:
        wait("a measurement", lambda: any((runs / "measurements").glob("*.json")))
        wait("a job on the second node", lambda: running("second") is not None)
        lost = running("second")
        print(f"killed {kill_node('second')} processes of the second node, with {lost}", flush=True)
        print(first.communicate(timeout=SECONDS)[0])
    summary = json.loads((runs / "summary.json").read_text())
    codes = {job["name"]: job["exit_code"] for job in summary["jobs"]}
    print(f"said of {lost}: {next(job['error'] for job in summary['jobs'] if job['name'] == lost)}")
    expect("exit codes of the jobs", codes, {f"job-{number}": int(f"job-{number}" == lost) for number in range(4)})
    expect("exit code", first.returncode, 1)
    expect("state of the second node", states()["second"].rstrip("*"), "down")
    before = times(runs)
    start_node("second", stack)
    wait("two idle nodes", lambda: states() == dict.fromkeys(NODES, "idle"))
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    print(again.stdout)
    rerun = json.loads((runs / "summary.json").read_text())
    expect("exit code of the rerun", again.returncode, 0)
    expect("jobs that were run again", [job["name"] for job in rerun["jobs"] if job["ran"]], [lost])
    expect("other results are as they were", before.items() <= times(runs).items(), True)


def running(node: str) -> str | None:
    """The job of the batch whose process is under way on a node."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            there = f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if there and "quantize" in words and "-c" in words:
                return Path(words[words.index("-c") + 1]).stem
    return None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        place = Path(sys.argv[1]).absolute()
        place.mkdir(parents=True, exist_ok=True)
        main(place)
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
