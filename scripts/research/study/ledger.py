"""What `study_mixed.py` has judged so far, a line of JSON for every plan and use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawqtool.errors import UsageError
from hawqtool.pipeline.search.trials import formats_key
from hawqtool.records import BitPlan


class Ledger:
    """``OUT.jsonl``: written anew with each line, so that a killed run leaves whole ones.

    Args:
        path: The file.
        settings: What all lines depend on.

    Raises:
        UsageError: If the file has lines of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(text) for text in texts]
        for line in self.lines:
            other = [key for key, value in self.settings.items() if line["settings"].get(key) != value]
            if other:
                raise UsageError(f"{path} has lines of other settings ({', '.join(other)}); name another file")

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line."""
        self.lines.append({"model": self.settings["model"], **line, "settings": self.settings})
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        part.replace(self.path)

    def known(self, seed: int, plan: BitPlan) -> dict[str, Any] | None:
        """What a plan of the same formats gave on each text."""
        key = formats_key(plan.formats)
        return next((line["texts"] for line in self.lines if (line["seed"], line["plan"]) == (seed, key)), None)

    def missing(self, seed: int, budget: float, rivals: bool) -> set[str]:
        """Roles at a budget that have no line; which rivals there are the shipped plan's line says."""
        found = {line["role"]: line for line in self.lines if (line["seed"], line["budget"]) == (seed, budget)}
        if "shipped" not in found:
            return {"shipped", "uniform", "rule"} if rivals else {"shipped"}
        return set(found["shipped"]["beside"]) - set(found) if rivals else set()

    def missing_anchors(self, seed: int, labels: Sequence[str]) -> list[str]:
        """Anchors without a line."""
        found = {line["label"] for line in self.lines if line["seed"] == seed and line["role"] == "anchor"}
        return [label for label in labels if label not in found]
