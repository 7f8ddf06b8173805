"""Inputs for fuzzing: valid files with a few mutations, so that they come past the first check, and noise."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from hypothesis import strategies as st

from fuzzing.targets import UNITS
from hawqtool.checkpoint.dtypes import DTYPE_BYTES
from hawqtool.config import RunConfig
from hawqtool.pipeline.run.files import PLAN_SCHEMA, SENSITIVITY_SCHEMA


class Pairs(list[tuple[Any, Any]]):
    """An object as pairs, so that a key can stand in it twice."""


@dataclass(frozen=True)
class Nested:
    """A value inside so many lists, which would be too deep to walk."""

    value: Any
    depth: int


_NUMBERS = [0, 1, -1, 2, 3, 8, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**4200]
_FLOATS = [0.0, -0.0, 0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf]
_TEXTS = [
    "", " ", "channel", "w4g64", "w9g64", "nan", "self", "1e999", "../x.safetensors", "/etc/passwd", "..", "a\0b",
    "x" * 5000, "\x1b[2J\x1b]0;t\x07", "\u202e", "\ud800", "\n", "re:(", "re:(a+)+$=4", "=", "0x" + "f" * 5000,
    "9" * 5000, "${HOME}", "<script>", "\u0664",
]  # fmt: skip
_EMPTY: list[Any] = [None, True, False, [], {}, [[]], [{}], [None], [0, 0], {"": 0}]

STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([*_NUMBERS, *_FLOATS, *_TEXTS, *_EMPTY]), st.text(max_size=12), st.integers(), st.floats()
)
KEYS = st.one_of(st.sampled_from(["name", "bits", "scores", "units", "__metadata__", "schema", "", "\x1b"]), st.text())
MUTATIONS = ("replace", "remove", "repeat", "rename", "wrap", "swap", "number")


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, _pairs(child)) for key, child in value.items())
    return [_pairs(child) for child in value] if isinstance(value, list | tuple) else value


def _places(value: Any, found: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Every container with the position of each child."""
    if isinstance(value, list):
        for number, child in enumerate(value):
            found.append((value, number))
            _places(child[1] if isinstance(value, Pairs) else child, found)
    return found


def _text(value: Any) -> str:
    """JSON as Python writes it, with keys as often as they stand there."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(str(key))}:{_text(child)}" for key, child in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, Nested):
        return "[" * value.depth + _text(value.value) + "]" * value.depth
    return json.dumps(value)


def _mutate(draw: Any, root: list[Any]) -> None:
    """One mutation at a random place; ``root`` is a list of the document alone."""
    places = _places(root, [])
    container, number = places[draw(st.integers(0, len(places) - 1))] if places else (root, 0)
    if not places:
        return
    named = isinstance(container, Pairs)
    key, value = container[number] if named else (None, container[number])
    kind = draw(st.sampled_from(MUTATIONS))
    if kind == "remove" and container is not root:
        del container[number]
        return
    if kind == "repeat" and container is not root:
        container.append((key, _pairs(draw(STRANGE))) if named else value)
        return
    if kind == "swap" and container is not root:
        container.reverse()
        return
    if kind == "rename" and named:
        key = draw(KEYS)
    elif kind == "wrap":
        value = Nested(value, draw(st.sampled_from([1, 2, 63, 70, 300, 2000])))
    elif kind == "number" and isinstance(value, int):
        value = value + draw(st.sampled_from([1, -1, 4, -4, 8, 1 << 40, -(1 << 40)]))
    else:
        value = _pairs(draw(STRANGE))
    container[number] = (key, value) if named else value


def _spoil(draw: Any, content: bytes) -> bytes:
    """Now and then a change of the bytes themselves."""
    kind = draw(st.sampled_from(["none"] * 6 + ["cut", "flip", "insert", "double"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and content:
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(max_size=8)) + content[place:]
    return content + content if kind == "double" else content


def _mutated(draw: Any, document: Any) -> str:
    root = [_pairs(document)]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        _mutate(draw, root)
    return _text(root[0])


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Safetensors files of up to four tensors; offsets, shapes, names and the length of the header may be wrong."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        table[f"t.{number}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = _mutated(draw, table).encode("utf-8", "surrogatepass")
    lengths = [0] * 8 + [1, -1, 8, 1 << 32, 1 << 62]
    length = (len(text) + draw(st.sampled_from(lengths))) % (1 << 64)
    return _spoil(
        draw, length.to_bytes(8, "little") + text + bytes(max(end + draw(st.sampled_from([0, 0, 0, 1, -1])), 0))
    )


@st.composite
def documents(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document with mutations."""
    return _spoil(draw, _mutated(draw, document).encode())


_YAML_PIECES = [
    "a: &a [x, x]\nb: *a\n", "seed: 1\nseed: 2\n", "? [a]\n: b\n", "<<: {seed: 1}\n", "- a\n", "seed: !!int '3'\n",
    "x: !!python/object/apply:os.system ['true']\n", "model: |\n  text\n", "date: 2020-99-99\n", "seed: 0b\n",
    "seed: 1:60:60\n", "seed: 1:2:3.5e400\n", "seed: " + "1:" * 400 + "0.5\n", "seed: 0x" + "f" * 5000 + "\n",
    "seed: " + "9" * 5000 + "\n", "seed: " + "[" * 400 + "\n", "{" * 70 + "}" * 70 + "\n", "%YAML 9.9\n---\n",
    "---\na: 1\n---\nb: 2\n", "\t", ": ", "- - - -\n", 'model: "\\ud800\\x1b[2J"\n', "seed: .nan\n", "seed: -.inf\n",
    "seed: ~\n", "model: ''\n", "&a a: *a\n", "\ufeff", "# c\n",
]  # fmt: skip


@st.composite
def run_files(draw: st.DrawFn) -> bytes:
    """YAML of a run: keys of the configuration with values of any kind, and what only YAML knows."""
    fields = list(RunConfig.model_fields)
    known = st.sampled_from(fields)
    names = draw(st.one_of(st.lists(known, max_size=2), st.lists(st.one_of(known, KEYS), max_size=5)))
    good = {"model": "m", "target_bpw": 4, "bits": [2, 4], "calibration": ["self", "a.txt=2"], "pin": ["re:.*=4"]}
    values: dict[str, Any] = draw(st.sampled_from([{}, {"model": "m"}, good, good, good]))
    values = values | {name: draw(STRANGE) for name in names}
    # JSON is YAML; strings, numbers and lists are read by other rules, though.
    lines = "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in values.items())
    pieces = draw(st.one_of(st.just([]), st.lists(st.sampled_from(_YAML_PIECES), max_size=2)))
    return _spoil(draw, (lines + "".join(pieces)).encode("utf-8", "surrogatepass"))


@st.composite
def batch_files(draw: st.DrawFn) -> bytes:
    """Batches with mutations, and lists that multiply."""
    document: dict[str, Any] = json.loads(json.dumps(_BATCH))
    for key in draw(st.lists(st.sampled_from(list(RunConfig.model_fields)), max_size=2)):
        document["defaults"][key] = draw(STRANGE)
    axes = draw(st.dictionaries(st.sampled_from(list(RunConfig.model_fields)), st.integers(0, 40), max_size=6))
    document["matrix"] |= {key: list(range(length)) for key, length in axes.items()}
    pieces = draw(st.one_of(st.just([]), st.lists(st.sampled_from(_YAML_PIECES), max_size=1)))
    lines = "".join(f"{line}\n" for line in [_mutated(draw, document)])
    return _spoil(draw, (lines + "".join(pieces)).encode("utf-8", "surrogatepass"))


def _plan() -> dict[str, Any]:
    layers = [
        {"name": m.name, "unit": u.name, "bits": 4, "group_size": 64, "symmetric": True, "bytes": 1}
        for u in UNITS
        for m in u.members
    ]
    return {"schema": PLAN_SCHEMA, "layers": layers, "other_linears": []}


def _sensitivity() -> dict[str, Any]:
    scores = {"fisher": {unit.name: {"w4g64": [0.5, 0.1], "w2g64": [1.5, None]} for unit in UNITS}}
    return {
        "schema": SENSITIVITY_SCHEMA, "model": "m", "model_fingerprint": "0", "rounding": "gptq", "symmetric": True,
        "settings": {"seed": 0}, "rows": {"scoring": "0"}, "unquantized_bytes": 10, "scores": scores,
        "units": {unit.name: [asdict(member) for member in unit.members] for unit in UNITS},
        "projections": {unit.name: {"w4g64": [0.1, 0.2]} for unit in UNITS},
        "curvature": {unit.name: {"trace": 1.0, "other": None} for unit in UNITS}, "warnings": ["w"],
    }  # fmt: skip


_BATCH = {
    "output": "runs",
    "defaults": {"calibration": "self", "bits": [2, 4], "group_size": "channel"},
    "matrix": {"model": ["m", "n"], "target_bpw": [3.5, 4], "way": [{"rounding": "rtn", "name": "plain"}, {"seed": 1}]},
    "jobs": [{"model": "m", "target_size": "1MB", "name": "other"}],
}
_COSTS = [{"unit": "re:.*", "format": 4, "cost": 1.5}, {"unit": "b.0.o", "format": "w8g64", "cost": 2}]
_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors"}}
_CONFIG = {"model_type": "llama", "hidden_size": 64, "architectures": ["A"], "rope": {"theta": 1.0}, "auto_map": {}}


@st.composite
def cards(draw: st.DrawFn) -> bytes:
    """Markdown with a YAML head, and text of any kind below it."""
    head = draw(run_files())
    body = draw(st.one_of(st.text(), st.sampled_from(["```\n````", "<script>", "| a | b |", "[x](javascript:1)"])))
    return b"---\nlicense: mit\n" + head + b"---\n" + body.encode("utf-8", "surrogatepass")


_CSV = b"unit,format,cost\nre:.*,4,1\n"

STRATEGIES: dict[str, st.SearchStrategy[bytes]] = {
    "header": headers(),
    "shard_index": documents(_INDEX),
    "run_config": run_files(),
    "batch": batch_files(),
    "any_yaml": st.one_of(run_files(), st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary()),
    "model_config": documents(_CONFIG),
    "plan": documents(_plan()),
    "sensitivity": documents(_sensitivity()),
    "costs": st.one_of(documents(_COSTS), st.binary().map(lambda rest: _CSV + rest)),
    "card": cards(),
}


def seeds() -> dict[str, bytes]:
    """One valid file for each target, from which a mutating fuzzer starts."""
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    return {
        "header": len(text).to_bytes(8, "little") + text + b"\0",
        "shard_index": json.dumps(_INDEX).encode(),
        "run_config": b"model: m\ntarget_bpw: 4\nbits: [2, 4]\ncalibration: [self, a.txt=2]\npin: ['re:.*=4']\n",
        "batch": json.dumps(_BATCH).encode(),
        "any_yaml": b"a: &x [1, 2.5, 'c']\nb: {c: 2020-01-01}\n",
        "model_config": json.dumps(_CONFIG).encode(),
        "plan": json.dumps(_plan()).encode(),
        "sensitivity": json.dumps(_sensitivity()).encode(),
        "costs": json.dumps(_COSTS).encode(),
        "card": b"---\nlicense: mit\ntags: [a, b]\n---\n# text\n",
    }  # fmt: skip
