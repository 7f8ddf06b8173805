"""Reads the Markdown pages of the project: links, anchors, commands and tables, and what is wrong with them.

Each checker is a function from text to a list of faults, so that it can be tried on a planted one.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORIGIN = ("Commit", "Machine", "Command")
"""What a section with figures names, each in a line of its own: ``- Commit: `1234567```."""

_FENCE = re.compile(r"^(?P<ticks>`{3,})[^\n]*\n(?P<text>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_PROGRAM = re.compile(r"^\s*(?:\$ )?(?:\.venv/bin/)?hawqtool (?P<arguments>.*)")


def without_code(text: str) -> str:
    """The text of a page without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them; a heading that comes again gets a number."""
    seen: Counter[str] = Counter()
    found = set()
    for title in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of a page."""
    wrong = []
    for link in _LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            wrong.append(f"{page.name} links to {link}, which is no file")
        elif anchor and target.suffix == ".md":
            body = text if target == page else target.read_text(encoding="utf-8")
            if anchor not in anchors(body):
                wrong.append(f"{page.name} links to {link}, which has no such heading")
    return wrong


def lost_paths(root: Path, text: str) -> list[str]:
    """Files of the project that a page names, in text or code, and that aren't there."""
    named = re.findall(r"(?<![\w/.-])(?:scripts|configs|hawqtool|tests|docs)/[\w./-]*\w", text)
    return [f"{name} is no file" for name in dict.fromkeys(named) if not (root / name).exists()]


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every ``hawqtool`` command in the fenced blocks of a page, without comments and redirections."""
    for block in _FENCE.finditer(text):
        for line in block["text"].replace("\\\n", " ").splitlines():
            found = _PROGRAM.match(line)
            if found:
                # A variable of a script stands for some value.
                words = shlex.split(re.sub(r"\$\w+", "1", found["arguments"]), comments=True)
                ends = [i for i, word in enumerate(words) if word in {">", "2>", "|", "&&", "||"}]
                yield words[: min(ends, default=len(words))]


def refused_commands(program: Any, text: str) -> list[str]:
    """Commands of a page that the command line's own parser refuses; nothing is run."""
    from typer.exceptions import Exit

    wrong = []
    for words in commands(text):
        try:
            root = program.make_context("hawqtool", list(words), resilient_parsing=False)
            rest = [*root._protected_args, *root.args]
            name, command, rest = program.resolve_command(root, rest)
            command.make_context(name, rest, parent=root)
        except Exit:
            continue  # --help and --version end the parser when all before them was right
        except SystemExit as end:  # with the parser's own error as its cause
            wrong.append(f"hawqtool {shlex.join(words)}: {getattr(end.__cause__, 'message', end)}")
    return wrong


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Title and text of every section of the second level, blocks of code left out."""
    for part in re.split(r"^## +", _FENCE.sub("", text), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        yield title.strip(), body


def tables(text: str) -> list[list[str]]:
    """Rows of every table, without the head and the line below it."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [rows[2:] for rows in found if rows]


def figures_without_origin(text: str) -> list[str]:
    """Sections that hold a table of figures and don't name commit, machine and command."""
    wrong = []
    for title, body in sections(text):
        if not tables(body):
            continue
        for word in ORIGIN:
            value = r"`[0-9a-f]{7,40}`" if word == "Commit" else r"\S.*"
            if not re.search(rf"^- {word}: .*{value}", body, re.MULTILINE):
                wrong.append(f"{title}: no line '- {word}: ...'")
    return wrong


def first_command_line(text: str) -> int:
    """Number of the line of the first command in a fenced block; 0 where there is none."""
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif inside and re.match(r"(\$ )?(scripts/|hawqtool |pip |git )", line):
            return number
    return 0
