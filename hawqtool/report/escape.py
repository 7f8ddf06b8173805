"""Text of unknown origin in Markdown: shown as it is, never interpreted."""

from __future__ import annotations

import re

_CODE_SAFE = re.compile(r"[\w./:=,+%^()?' -]+")
_MARKUP = re.compile(r"[\\`*_{}\[\]#|~$!@]|:(?=\S)|^[-+=](?=\s|$|[-+=])|(?<=[wW]{3})\.")
"""What begins markup inside a line, a list at its start, or a link that renderers make of bare addresses."""
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_LONGEST = 200


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Printable characters of a text on one line, cut with an ellipsis beyond ``longest``."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def escape(text: object) -> str:
    """Text that Markdown shows literally, on one line and safe in a table cell: no markup, link or HTML survives."""
    marked = _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", one_line(text)))
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """Text as a code span where it consists of harmless characters, else escaped."""
    plain = one_line(text)
    return f"`{plain}`" if _CODE_SAFE.fullmatch(plain) else escape(plain)


def fenced(text: str, language: str) -> str:
    """A code block that its content cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """A Markdown table of cells that are safe already; with ``numbers``, columns after the first go to the right."""
    rule = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
