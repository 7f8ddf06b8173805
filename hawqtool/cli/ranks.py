"""Several processes for one command: started here, one per GPU, and told apart by what they were started with."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hawqtool.cli.session import decide_hub_access, session
from hawqtool.cli.signals import INTERRUPTED, TERMINATED
from hawqtool.config import load_config
from hawqtool.errors import HawqError
from hawqtool.runtime.imports.head_start import head_start
from hawqtool.runtime.launched import OTHER_GONE, world_size

_LOOPBACK = "lo"
"""Interface by which processes of one machine find each other. By its own name they might ask a server that does not
answer, for longer than a run takes."""

_KEPT = "finished work is kept, and the same command goes on with it"


def start_ranks(config: Path | None, values: Mapping[str, Any], preset: str | None) -> None:
    """Run the command in as many processes as --gpus says, and end with their exit code.

    Returns where one process is enough, and in each of several.
    """
    if world_size() > 1:
        return
    try:
        count = load_config(config, values, preset).gpus
    except HawqError:
        return  # the command says it
    if count > 1:
        raise SystemExit(_run(count, [sys.executable, "-m", "hawqtool", *sys.argv[1:]]))


def assist(
    config: Path | None, values: Mapping[str, Any], preset: str | None, debug: bool, judged: Path | None = None
) -> None:
    """Do a share of what the leading process does; it alone speaks, but for what fails here.

    Args:
        config: File of the configuration.
        values: Settings of the command line.
        preset: Name of the preset.
        debug: Whether errors come with their traceback.
        judged: Written folder, where that is evaluated and nothing is made.
    """
    with session(quiet=True, debug=debug):
        settings = load_config(config, values, preset)
        decide_hub_access(settings.data_sources)
        head_start(settings.device)

        from hawqtool.pipeline.evaluate import as_written
        from hawqtool.pipeline.worker import work

        work(settings if judged is None else as_written(settings, judged), writes=judged is None)


def _run(count: int, command: list[str]) -> int:
    """Exit code of the processes' leader, or 1 where another failed first; one line says so.

    torch's launcher ends all where one fails, and hands signals on.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes speak for themselves
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(settings, command[0])(*command[1:])
    except SignalException as error:
        if error.sigval == signal.SIGINT:  # which the leader got too, and told
            return INTERRUPTED
        print(f"terminated: {_KEPT}", file=sys.stderr)
        return TERMINATED
    except ChildFailedError as error:
        return _failed(error, count)
    return 0


def _failed(error: Any, count: int) -> int:
    """Exit code after a failure; the leader's own has been told by the leader."""
    rank, failure = error.get_first_failure()
    # Who was killed is the reason, whoever was noticed first; the others ended for it.
    killed = ((number, one) for number, one in error.failures.items() if one.exitcode == -signal.SIGKILL)
    rank, failure = next(killed, (rank, failure))
    if rank == 0 and failure.exitcode > OTHER_GONE:
        return int(failure.exitcode)
    how = f"by signal {-failure.exitcode}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
    print(
        f"error: process {rank + 1} of {count} ended {how}, so that the others were ended too; {_KEPT}",
        file=sys.stderr,
    )
    return 1
