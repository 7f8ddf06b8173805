"""Which engines load a packed checkpoint, and why not where they do not.

The rules are those of the engines' released sources. A run tries transformers alone (pipeline/load_trial); each
reason says what it rests on.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hawqtool.checkpoint.fusion import unit_name
from hawqtool.formats import CHANNEL, is_served
from hawqtool.records import LayerFormats
from hawqtool.report.schema import Engine

TRANSFORMERS, VLLM, VLLM_CPU, SGLANG = (
    "transformers with compressed-tensors",
    "vLLM (CUDA)",
    "vLLM (CPU)",
    "SGLang (CUDA)",
)
MINIMUM_VERSIONS = {
    TRANSFORMERS: "transformers 5, compressed-tensors 0.18",
    VLLM: "0.33, compute capability 7.5",
    VLLM_CPU: "0.33",
    SGLANG: "0.5.23, compute capability 8.0",
}
"""Oldest versions whose behaviour is known; earlier ones may do."""

_STAYS_PACKED = "a smaller file, and as much less memory for weights, which stay packed"
_FASTER = f"{_STAYS_PACKED}; faster where reading them is the limit"
GAINS = {
    TRANSFORMERS: "a smaller file; no memory while running, as the first pass unpacks all to 16 bits, and no speed",
    VLLM: _FASTER,
    VLLM_CPU: _STAYS_PACKED,
    SGLANG: _FASTER,
}
"""What the result gains in an engine that loads it, by its documentation and source; speed was not measured here."""

RUNS_FILE = Path(__file__).with_name("engine_runs.json")
"""Runs in engines that were seen; serve.py adds to it."""

CLOSE = 0.005
"""Largest relative difference of perplexities at which an engine counts as computing what was judged."""

_MARLIN_BITS = (4, 8)
_ALIGNMENT = 32
_SOURCE_ONLY = "by its source, not run here"
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<role>.+)")

Verdict = tuple[bool | None, str]
"""Whether an engine loads the checkpoint, None where that is not known, and why."""


def engines(
    formats: LayerFormats,
    shapes: Mapping[str, tuple[int, int]],
    obstacle: str | None = None,
    table: bool = False,
    cache_format: str | None = None,
) -> list[Engine]:
    """What each engine does with a checkpoint, from formats and shapes alone.

    Args:
        formats: Format of every packed module, by name in the checkpoint.
        shapes: Rows and columns of these modules' weights.
        obstacle: Why transformers cannot load packed weights of this model, where it cannot.
        table: Whether its embedding is stored in 8 bits.
        cache_format: That of the KV cache; None where it stays in 16 bits.

    Returns:
        One ``{engine, minimum_version, loads, reason, tried}`` per engine; ``tried`` is false, as nothing is run here.
    """
    found: list[Engine] = []
    for engine, judge in (
        (TRANSFORMERS, _transformers),
        (VLLM, _vllm),
        (VLLM_CPU, _vllm_cpu),
        (SGLANG, _sglang),
    ):
        loads, reason = (False, obstacle) if engine == TRANSFORMERS and obstacle else judge(formats, shapes)
        if table and engine != TRANSFORMERS:
            loads, reason = False, f"its embedding is stored in 8 bits as transformers reads it ({_SOURCE_ONLY})"
        if cache_format is not None and loads is not False:
            reason = f"{reason}; {_CACHES[engine]}"
        if loads and (seen := run_note(engine_runs(), engine, formats, cache_format)) is not None:
            reason = f"{reason.replace(f' ({_SOURCE_ONLY})', '')}; {seen}"
        version = MINIMUM_VERSIONS[engine]
        entry: Engine = {"engine": engine, "minimum_version": version, "loads": loads, "reason": reason, "tried": False}
        found.append({**entry, "gain": GAINS[engine]})
    return found


@dataclass(frozen=True)
class EngineRun:
    """A folder that an engine was seen to serve (`scripts/benchmarks/serve.py --record`).

    Args:
        engine: Its name, as above.
        version: Its version.
        card: Name of the card.
        date: Day, ``YYYY-MM-DD``.
        labels: Formats of the folder's layers.
        cache: Format of its KV cache; None for 16 bits.
        difference: Of its perplexity from that of `hawqtool evaluate` on the same rows, relative.
    """

    engine: str
    version: str
    card: str
    date: str
    labels: tuple[str, ...]
    cache: str | None
    difference: float


@cache
def engine_runs() -> tuple[EngineRun, ...]:
    """The runs that are recorded beside this module."""
    runs = json.loads(RUNS_FILE.read_text(encoding="utf-8"))
    return tuple(EngineRun(**run | {"labels": tuple(run["labels"])}) for run in runs)


def run_note(runs: Sequence[EngineRun], engine: str, formats: LayerFormats, cache_format: str | None) -> str | None:
    """Where and when an engine was seen to compute all formats of a checkpoint rightly; None where it was not.

    Layers are served one by one, so that formats may have been seen in several folders, of one version on one card.
    """
    wanted, places = {fmt.label for fmt in formats.values()}, defaultdict[tuple[str, str], list[EngineRun]](list)
    for run in runs:
        if run.engine == engine and abs(run.difference) <= CLOSE:
            places[run.version, run.card].append(run)
    for (version, card), seen in reversed(places.items()):
        cached = [run for run in seen if cache_format is not None and run.cache == cache_format]
        fine = cached + [run for run in seen if wanted & set(run.labels)]
        known = {label for run in fine for label in run.labels}
        if fine and wanted <= known and (cache_format is None or cached):
            most = max(abs(run.difference) for run in fine)
            return (
                f"its formats were run in version {version}{_already(version, engine)} on {card} on "
                f"{max(run.date for run in fine)}, with perplexities within {100 * most:.2g} % of ours"
            )
    return None


def _already(version: str, engine: str) -> str:
    """What is said of a version before the one whose source was read."""
    run, read = (
        [int(n) for n in re.findall(r"\d+", text.partition(",")[0])] for text in (version, MINIMUM_VERSIONS[engine])
    )
    return " already" if run < read else ""


_CACHES = {
    TRANSFORMERS: "it rounds keys and values by the scales of the file, and keeps them in 16 bits",
    VLLM: "its KV cache is FP8 with the scales of the file, one a head on FlashAttention alone, by its source",
    VLLM_CPU: "its KV cache becomes FP8 by the file; whether the scales are used there is not known",
    SGLANG: "it takes scales of the KV cache with --kv-cache-dtype fp8_e4m3, one a layer alone, by its source",
}
"""What each engine does with a KV cache that the file says is FP8."""

_VLLM_KERNELS = {
    "fp8": "fp8 on Humming kernels, from compute capability 8.9 on these alone",
    "fp8-a8f": "fp8-a8f on Cutlass from 8.9 on, with inputs as they are on Marlin below",
    "fp8b128": "fp8b128 on Humming kernels, from compute capability 8.9 on these alone",
    "fp8b128-a8f": "fp8b128-a8f on DeepGEMM or Cutlass from 8.9 on, with inputs as they are on Marlin below",
    "nvfp4": "nvfp4 on Marlin",
    "nvfp4-a4": "nvfp4-a4 with rounded inputs from 10.0 on, on Marlin with inputs as they are below",
    "mxfp4": "mxfp4 on Marlin, from 10.0 on with inputs rounded to MXFP4 whatever the file says",
    "mxfp4-a4": "mxfp4-a4 with rounded inputs from 10.0 on, on Marlin with inputs as they are below",
    "mxfp8": "mxfp8 on Marlin, from 10.0 on with inputs rounded to MXFP8 whatever the file says",
    "mxfp8-a8": "mxfp8-a8 with rounded inputs from 10.0 on, on Marlin with inputs as they are below",
    "w8ch-a8i": "w8ch-a8i on Cutlass up to 9.0; its documentation excludes 10.0 and later",
    "w4g128-a8f": "w4g128-a8f on Cutlass at 9.0 alone, an error elsewhere",
}
"""What vLLM 0.33 runs a format of floats or with rounded inputs on, by compute capability, by its source."""

_CPU_LABELS = ("w8ch-a8i", "fp8-a8f")


def _special(formats: LayerFormats) -> list[str]:
    """Labels of formats of floats or with rounded inputs."""
    return sorted({fmt.label for fmt in formats.values() if not fmt.is_plain})


def _plain(formats: LayerFormats) -> LayerFormats:
    return {name: fmt for name, fmt in formats.items() if fmt.is_plain}


def _transformers(formats: LayerFormats, shapes: Mapping[str, tuple[int, int]]) -> Verdict:
    asymmetric = [name for name, fmt in formats.items() if not fmt.symmetric]
    if asymmetric:
        return False, (
            f"{len(asymmetric)} layers have zero points (first {asymmetric[0]}), which transformers 5.17 was "
            "seen to load exactly and 5.23 to refuse"
        )
    labels = {fmt.label for name, fmt in formats.items() if _EXPERT.match(name)}
    if len(labels) > 1:
        return False, (
            f"experts have formats {', '.join(sorted(labels))}; it decompresses all experts of a model with one and "
            "would compute wrong results"
        )
    if _special(formats):
        return True, (
            f"compressed-tensors decodes {', '.join(_special(formats))} and rounds inputs where the label says so; the "
            "first forward pass decompresses the whole model; tested on small models, not with this folder"
        )
    return True, (
        "symmetric formats of every width and group size; the first forward pass decompresses the whole model; "
        "tested on small models, not with this folder"
    )


def _vllm(formats: LayerFormats, shapes: Mapping[str, tuple[int, int]]) -> Verdict:
    problem = _mixed_experts(formats) or _split_set(formats) or _unusual_groups(_plain(formats))
    if problem:
        return False, f"{problem} ({_SOURCE_ONLY})"
    bare = next((n for n, f in formats.items() if f.grid == "fp8" and not f.activations and _EXPERT.match(n)), None)
    if bare is not None:
        return (
            False,
            f"it takes experts in FP8 with rounded inputs only, those of {bare} are not ({_SOURCE_ONLY})",
        )
    special, formats = _special(formats), _plain(formats)
    odd = {name: fmt for name, fmt in formats.items() if fmt.bits not in _MARLIN_BITS}
    wrong = [name for name in formats if shapes[name][1] % _ALIGNMENT or (name in odd and shapes[name][0] % _ALIGNMENT)]
    if wrong:
        rows, columns = shapes[wrong[0]]
        return False, (
            f"{len(wrong)} layers have a dimension that is no multiple of {_ALIGNMENT} (first {wrong[0]}, "
            f"{rows} x {columns}) ({_SOURCE_ONLY})"
        )
    whole = [name for name, fmt in odd.items() if fmt.group_size == CHANNEL and _EXPERT.match(name)]
    if whole:
        return False, f"experts of {odd[whole[0]].bits} bits need groups, not whole rows ({_SOURCE_ONLY})"
    kernels = [_VLLM_KERNELS[label] for label in special]
    if len(odd) < len(formats):
        kernels.append("4 and 8 bits run on Marlin or Machete")
    if odd:
        widths = ", ".join(map(str, sorted({fmt.bits for fmt in odd.values()})))
        kernels.append(f"{widths} bits on Humming kernels")
    return True, f"{'; '.join(kernels)} ({_SOURCE_ONLY})"


def _vllm_cpu(formats: LayerFormats, shapes: Mapping[str, tuple[int, int]]) -> Verdict:
    problem = _split_set(formats) or _unusual_groups(_plain(formats))
    if problem:
        return False, f"{problem} ({_SOURCE_ONLY})"
    special = [label for label in _special(formats) if label not in _CPU_LABELS]
    if special:
        return False, f"it has no kernels for {', '.join(special)} on CPUs ({_SOURCE_ONLY})"
    others = _other_widths(_plain(formats), (4,))
    if others:
        return False, f"its CPU kernels take 4 bits only, {others} ({_SOURCE_ONLY})"
    wrong = [name for name in formats if shapes[name][0] % _ALIGNMENT or shapes[name][1] % _ALIGNMENT]
    if wrong:
        return False, f"{wrong[0]} has a dimension that is no multiple of {_ALIGNMENT} ({_SOURCE_ONLY})"
    found = "4 bits" if _plain(formats) else ""
    return True, f"{' and '.join(filter(None, (found, *_special(formats))))} everywhere ({_SOURCE_ONLY})"


def _sglang(formats: LayerFormats, shapes: Mapping[str, tuple[int, int]]) -> Verdict:
    if _special(formats):
        return None, f"not known: its source was not read for {', '.join(_special(formats))}, nor was it run here"
    problem = _split_set(formats) or _unusual_groups(formats)
    if problem:
        return False, f"{problem} ({_SOURCE_ONLY})"
    others = _other_widths(formats, _MARLIN_BITS)
    if others:
        return False, f"it takes 4 and 8 bits only, {others} ({_SOURCE_ONLY})"
    if any(fmt.bits == 8 and not fmt.symmetric for fmt in formats.values()):
        return False, f"its kernels take zero points at 4 bits only ({_SOURCE_ONLY})"
    wrong = [name for name in formats if shapes[name][1] % _ALIGNMENT]
    if wrong:
        return False, f"{wrong[0]} has inputs that are no multiple of {_ALIGNMENT} ({_SOURCE_ONLY})"
    roles = {match["role"] for name in formats if (match := _EXPERT.match(name))}
    unknown = roles - {"gate_proj", "up_proj", "down_proj"}
    if unknown:
        return False, f"it looks for experts named gate_proj, up_proj, down_proj, not {min(unknown)} ({_SOURCE_ONLY})"
    return True, f"4 and 8 bits run on Marlin ({_SOURCE_ONLY})"


def _other_widths(formats: LayerFormats, taken: tuple[int, ...]) -> str:
    """Widths beyond those that an engine takes, for a sentence; empty if there are none."""
    others = [fmt.bits for fmt in formats.values() if fmt.bits not in taken]
    if not others:
        return ""
    return f"found {len(others)} of {len(formats)} layers at {', '.join(map(str, sorted(set(others))))} bits"


def _mixed_experts(formats: LayerFormats) -> str | None:
    """Experts of one layer that differ in format."""
    labels: dict[str, set[str]] = defaultdict(set)
    for name, fmt in formats.items():
        if match := _EXPERT.match(name):
            labels[match["experts"]].add(fmt.label)
    mixed = next((name for name, found in labels.items() if len(found) > 1), None)
    return None if mixed is None else f"{mixed} has formats {', '.join(sorted(labels[mixed]))}; it needs one"


def _split_set(formats: LayerFormats) -> str | None:
    """A set of linears that serving engines fuse, whose members differ in format."""
    labels: dict[str, set[str]] = defaultdict(set)
    for name, fmt in formats.items():
        if not _EXPERT.match(name):
            labels[unit_name(name, formats)].add(fmt.label)
    split = next((name for name, found in labels.items() if len(found) > 1), None)
    return None if split is None else f"it fuses {split}, which has formats {', '.join(sorted(labels[split]))}"


def _unusual_groups(formats: LayerFormats) -> str | None:
    """Groups of a size that no kernel is known to take."""
    odd = [(name, fmt.group_size) for name, fmt in formats.items() if not is_served(fmt.group_size)]
    if not odd:
        return None
    name, size = odd[0]
    return f"{len(odd)} layers have groups of other sizes than 32, 64, 128 and whole rows (first {name}, {size})"
