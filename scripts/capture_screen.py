"""Run a command on a terminal of so many columns, and print what it showed: every frame once, and the longest silence.

    python scripts/capture_screen.py 80 hawqtool quantize MODEL -o OUT --bits 4

The frames of docs/screens.md are from here. A frame is a line as it stood; one that a bar drew over another counts as
another. The exit code is that of the command.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from dataclasses import dataclass, field

_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_ROWS = 40


@dataclass
class Capture:
    """What a command showed.

    Args:
        frames: Seconds since the start and the line, each one that differs from the one before.
        silence: Longest time in seconds without anything new on the terminal, and when it ended.
        code: Exit code.
    """

    frames: list[tuple[float, str]] = field(default_factory=list)
    silence: tuple[float, float] = (0.0, 0.0)
    code: int = 0


def capture(command: list[str], columns: int) -> Capture:
    """Run a command under a pseudo-terminal."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        os.execvpe(command[0], command, environment | {"TERM": "xterm-256color"})
    found, began = Capture(), time.monotonic()
    last, pending = 0.0, ""
    while data := _read(terminal):
        now = time.monotonic() - began
        found.silence, last = max(found.silence, (now - last, now)), now
        *lines, pending = re.split(r"[\r\n]+", pending + data)
        for line in lines:
            text = _CODES.sub("", line).rstrip()
            if text and text not in [frame for _, frame in found.frames[-1:]]:
                found.frames.append((now, text))
    found.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return found


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # the command has ended
        return ""


def main() -> int:
    """Print frames and silence."""
    found = capture(sys.argv[2:], int(sys.argv[1]))
    for seconds, text in found.frames:
        print(f"{seconds:7.1f}  {text}")
    print(f"longest silence: {found.silence[0]:.1f} s, until {found.silence[1]:.1f} s")
    return found.code


if __name__ == "__main__":
    sys.exit(main())
