"""From exceptions and signals to one line on stderr and the documented exit code."""

from __future__ import annotations

import errno
import json as json_text
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hawqtool.checkpoint.source import MAY_FETCH
from hawqtool.cli.signals import INTERRUPTED, TERMINATED, Terminated, ending_signals
from hawqtool.cli.terminal import Terminal
from hawqtool.data.sources import is_hub
from hawqtool.errors import DISK_ERRORS, HawqError, QualityError, one_line
from hawqtool.parsing import printable, short, terminal_line
from hawqtool.runtime.launched import rank, world_size
from hawqtool.runtime.malloc import configure_allocators

ERROR_SCHEMA = "hawqtool.error/1"


@contextmanager
def session(quiet: bool = False, debug: bool = False, json: bool = False, verbose: bool = False) -> Iterator[Terminal]:
    """Run a command; expected failures become one line and their exit code.

    With ``json`` a failure is a document on stdout too, unless the terminal was told that the result stands there.
    """
    # Spinning worker threads take the cores of other programs; libraries must stay quiet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    configure_allocators()
    terminal = Terminal(quiet, verbose)
    code, failure, failed = 0, "", tuple[str, ...]()
    try:
        with ending_signals(), _quiet_libraries(debug):
            terminal.watch()
            yield terminal
    except HawqError as error:
        if debug:
            raise
        code, failure = error.exit_code, "; ".join([f"error: {terminal_line(str(error))}", *_notes(error)])
        failed = error.failed if isinstance(error, QualityError) else failed
    except KeyboardInterrupt as error:
        code, failure = INTERRUPTED, f"interrupted: {_left(error)}"
    except Terminated as error:
        code, failure = TERMINATED, f"terminated: {_left(error)}"
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        path = None if debug else _path_reason(error)
        reason = path if debug or path else _resource_reason(error)
        if reason is None:
            raise
        code, failure = 2 if path else 5, "; ".join([f"error: {terminal_line(reason)}", *_notes(error)])
    finally:
        terminal.end()
    if code:
        failure = printable(failure)
        if not _told_elsewhere(code):
            print(failure, file=sys.stderr)
        message = failure.removeprefix("error: ")
        annotate(failed or (message,), code)
        if json and not terminal.answered:
            print_json({"schema": ERROR_SCHEMA, "error": message, "exit_code": code})
        raise SystemExit(code)


def _told_elsewhere(code: int) -> bool:
    """Whether another of the processes of a run says why it ends: what started them, or the one that leads."""
    return world_size() > 1 and (code == TERMINATED or (rank() > 0 and code == INTERRUPTED))


@contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Keep Python's warnings, which libraries address to programmers, from between our lines, unless ``debug``."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        yield


def _notes(error: BaseException) -> list[str]:
    """What the work that was cut short says of what it kept."""
    return list(getattr(error, "__notes__", ()))


def _left(error: BaseException) -> str:
    return "; ".join(_notes(error)) or "nothing was left behind"


def _path_reason(error: BaseException) -> str | None:
    """One line for a path that no file system takes; None for all else."""
    advice = "expected the path of a file or folder; check the arguments"
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{short(str(error.filename))} is no path to use ({error.strerror}); {advice}"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return f"a path holds a null character; {advice}"
    return None


def _resource_reason(error: BaseException) -> str | None:
    """One line for memory or a disk that gave out somewhere; None for all else."""
    lower = "lower --batch-size, --num-samples or --seq-len"
    if isinstance(error, OSError):
        return f"writing failed: {error.strerror}; free some space" if error.errno in DISK_ERRORS else None
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory; {lower} ({one_line(error)})"
    # torch has no class of its own for memory that the system refuses.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory; {lower}"
    return None


def annotate(messages: Iterable[str], code: int) -> None:
    """One annotation of GitHub's job page per message, where a job of GitHub's runs this.

    They go to stderr, which the runner reads as well, so that stdout stays the result.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for message in messages:
        # A line break would begin a line of its own, which could be a command to the runner.
        data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        print(f"::error title=hawqtool exit code {code}::{data}", file=sys.stderr)


def decide_hub_access(sources: Iterable[str] = ()) -> None:
    """Keep libraries off the network, but for a model or dataset that was named; the user's own setting wins.

    To be called before work starts, as huggingface_hub reads the variable once, when it is imported.
    """
    if not os.environ.get("HF_HUB_OFFLINE") and not os.environ.get("TRANSFORMERS_OFFLINE"):
        os.environ["HF_HUB_OFFLINE"] = "0" if any(map(is_hub, sources)) else "1"
        os.environ[MAY_FETCH] = "1"


def print_json(document: Mapping[str, object]) -> None:
    """One strict JSON document on stdout; NaN, which JSON lacks, becomes null."""
    print(json_text.dumps(_without_nan(document), indent=1, allow_nan=False), flush=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
