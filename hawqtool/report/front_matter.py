"""The YAML head of a model card: what is taken over from the source's card, and what is added."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from hawqtool.report.escape import one_line

_MAX_CHARACTERS = 64_000
_MAX_VALUE = 300
_MAX_ITEMS = 200
_KEPT = (
    "license",
    "license_name",
    "license_link",
    "language",
    "library_name",
    "pipeline_tag",
    "tags",
    "datasets",
    "base_model",
)
"""Keys that stay true of the quantized model; measured results of the original, for one, do not."""

_LINK = re.compile(r"https?://[^\s<>\"']+|[\w.-]+(/[\w.-]+)*")
_MISSING = "has no front matter"

Value = str | list[str]


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML in which every scalar is text, so that the language ``no`` does not become False."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; tags are refused, for that of a merge multiplies what aliases name."""
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError("a tag")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class SourceFacts:
    """What the source's card states.

    Args:
        values: Kept keys with their values.
        note: Why something was left out, None if nothing was.
    """

    values: dict[str, Value] = field(default_factory=dict)
    note: str | None = None


def read_source(readme: str | None) -> SourceFacts:
    """Facts of a card; what cannot be read or is not plain text is left out and noted."""
    if readme is None:
        return SourceFacts(note="The source has no README.md, so nothing could be carried over from it.")
    loaded = _load(readme)
    if isinstance(loaded, str):
        return SourceFacts(note=f"The source's README.md {loaded}, so nothing was carried over from it.")
    values: dict[str, Value] = {}
    left_out = []
    for key, value in loaded.items():
        plain = _plain(value) if key in _KEPT else None
        if plain is None or (key == "license_link" and not (isinstance(plain, str) and _LINK.fullmatch(plain))):
            left_out.append(one_line(key, 40))
        else:
            values[key] = plain
    note = None
    if left_out:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        note = f"Keys of the source's front matter that were not carried over: {', '.join(left_out[:10])}{more}."
    return SourceFacts(values, note)


_TASKS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "image-text-to-text",
    "Model": "feature-extraction",
}
"""Ending of a class of transformers to the tag under which hubs list such models."""


def merged(facts: SourceFacts, base_model: Value, architecture: str) -> str:
    """Front matter of the quantized model's card, with its ``---`` lines.

    Args:
        facts: What the source's card states, which wins for library and task.
        base_model: Id of the original.
        architecture: Class of the model in transformers, which tells library and task where the source does not.
    """
    task = next((tag for ending, tag in _TASKS.items() if architecture.endswith(ending)), None)
    own_facts: dict[str, Value] = {"library_name": "transformers", **({"pipeline_tag": task} if task else {})}
    kept = own_facts | {k: v for k, v in facts.values.items() if k not in ("base_model", "tags")}
    tags = facts.values.get("tags", [])
    own = [tags] if isinstance(tags, str) else list(tags)
    front = kept | {
        "base_model": base_model,
        "base_model_relation": "quantized",
        "tags": list(dict.fromkeys([*own, "hawqtool", "compressed-tensors"])),
    }
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n"


def _load(readme: str) -> dict[str, Any] | str:
    """The mapping of the front matter, or what is wrong with it."""
    lines = readme.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return _MISSING
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return "has front matter without its closing line"
    text = "\n".join(lines[1:end])
    if len(text) > _MAX_CHARACTERS:
        return f"has front matter of more than {_MAX_CHARACTERS:,} characters"
    try:
        loaded = yaml.load(text, Loader=_PlainLoader)  # a SafeLoader with fewer types
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return "has front matter that is no plain YAML"
    if not loaded:
        return _MISSING
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        return "has front matter that is no mapping of names to values"
    return loaded


def _plain(value: Any) -> Value | None:
    """A short text, or a list of them in memory of its own; None for anything else."""
    if isinstance(value, str):
        return value if 0 < len(value) <= _MAX_VALUE and value.isprintable() else None
    if isinstance(value, list) and 0 < len(value) <= _MAX_ITEMS:
        # Not the lists in it: aliases can make of a few lines more of them than can be walked.
        texts = [item for item in value if isinstance(item, str) and _plain(item) is not None]
        return texts if len(texts) == len(value) else None
    return None
