"""From exceptions and signals to one line on stderr and the documented exit code."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hawqtool.cli.terminal import Terminal
from hawqtool.data.sources import is_hub
from hawqtool.errors import HawqError
from hawqtool.model.source import MAY_FETCH

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def session(quiet: bool = False, debug: bool = False) -> Iterator[Terminal]:
    """Run a command; expected failures become one line and their exit code."""
    # Spinning worker threads take the cores of other programs; libraries must stay quiet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    terminal = Terminal(quiet)
    previous = signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        yield terminal
    except HawqError as error:
        if debug:
            raise
        terminal.close()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        terminal.close()
        print("interrupted: nothing was left behind", file=sys.stderr)
        code = INTERRUPTED
    except _Terminated:
        terminal.close()
        print("terminated: nothing was left behind", file=sys.stderr)
        code = TERMINATED
    except MemoryError:
        print("error: out of memory; lower --rows-per-slice, --num-samples or --seq-len", file=sys.stderr)
        code = 5
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or debug:
            raise
        print(
            f"error: out of GPU memory; lower --rows-per-slice, --num-samples or --seq-len ({error})".splitlines()[0],
            file=sys.stderr,
        )
        code = 5
    finally:
        terminal.close()
        signal.signal(signal.SIGTERM, previous)
    if code:
        raise SystemExit(code)


def decide_hub_access(sources: Iterable[str] = ()) -> None:
    """Keep libraries off the network, but for a model or dataset that was named; the user's own setting wins.

    To be called before work starts, as huggingface_hub reads the variable once, when it is imported.
    """
    if not os.environ.get("HF_HUB_OFFLINE") and not os.environ.get("TRANSFORMERS_OFFLINE"):
        os.environ["HF_HUB_OFFLINE"] = "0" if any(map(is_hub, sources)) else "1"
        os.environ[MAY_FETCH] = "1"


def print_json(document: dict[str, Any]) -> None:
    """One strict JSON document on stdout; NaN, which JSON lacks, becomes null."""
    print(json.dumps(_without_nan(document), indent=1, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
