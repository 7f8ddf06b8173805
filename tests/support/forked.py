"""The command in processes that are forked from one which has torch and transformers ready: no start of seconds.

What is not tried this way is what happens before and while libraries are imported. A few tests of each file that
concerns processes start the installed command itself.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
READY = ("pipeline.quantize", "pipeline.inspection.checkpoint", "pipeline.gguf.verification", "cli.app")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What the command sets before it imports libraries, which read it once."""


@dataclass(frozen=True)
class Done:
    """A command that has ended; ``returncode`` is negative where a signal killed it."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A command under way; `wait` before the next one is started."""

    def __init__(self, process_id: int, answers: IO[str], folder: Path) -> None:
        self.process_id = process_id
        self._answers, self._folder = answers, folder
        self._done: Done | None = None

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return not Path(f"/proc/{self.process_id}").exists()

    def wait(self) -> Done:
        """How the command ended."""
        if self._done is None:
            code = int(self._answers.readline())
            streams = [(self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
            self._done = Done(code, *streams)
        return self._done


class Forks:
    """Starts commands, one after the other.

    Args:
        folder: Receives what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None

    def start(self, *arguments: object, encoding: str = "utf-8", reader: bool = True, **environment: str) -> Command:
        """Start ``hawqtool ARGUMENTS``.

        Args:
            arguments: Of the command.
            encoding: Of stdout and stderr.
            reader: Whether anybody reads stdout; otherwise it is a pipe whose other end is closed.
            environment: Variables beside those of this process.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                env=os.environ | QUIET | {"HF_MODULES_CACHE": str(self._folder / "modules")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {
            "arguments": [str(argument) for argument in arguments],
            "encoding": encoding,
            "reader": reader,
            "environment": dict(os.environ) | environment,
            "cwd": str(Path.cwd()),
            "folder": str(self._folder),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Command(int(self._server.stdout.readline()), self._server.stdout, self._folder)

    def run(self, *arguments: object, encoding: str = "utf-8", reader: bool = True, **environment: str) -> Done:
        """Start a command and wait for it."""
        return self.start(*arguments, encoding=encoding, reader=reader, **environment).wait()

    def close(self) -> None:
        """End the process that commands are forked from."""
        if self._server is not None:
            self._server.communicate()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands without the start of a process."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


def serve() -> None:
    """Fork a command for every line of stdin; answer with its process id and, once it has ended, its exit code."""
    for name in READY:
        importlib.import_module(f"hawqtool.{name}")
    while line := sys.stdin.readline():
        process = os.fork()
        if process == 0:
            become(json.loads(line))
            return
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def become(request: Mapping[str, Any]) -> None:
    """Be the command; what it raises ends the interpreter as it would the installed one's."""
    folder = Path(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if number == 1 and not request["reader"]:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, number)
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding=request["encoding"])
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["hawqtool", *request["arguments"]]
    from hawqtool.cli.app import main

    main()


if __name__ == "__main__":
    serve()
