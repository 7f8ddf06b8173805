"""The parsers that are fuzzed: each takes the bytes of a file and may fail with a HawqError only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from hawqtool.allocation.second_cost import CostTable
from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.config import load_config
from hawqtool.errors import HawqError
from hawqtool.export.packed_reader import read_config
from hawqtool.parsing import ParseError, parse_yaml, printable
from hawqtool.pipeline.batch.jobs_file import read_batch
from hawqtool.pipeline.run.files import read_plan, read_sensitivity
from hawqtool.records import LinearSpec, Unit
from hawqtool.report.escape import code, escape, fenced, one_line
from hawqtool.report.front_matter import merged, read_source

LONGEST_MESSAGE = 4000
"""Most characters of an error: hostile input must not flood a log."""

UNITS = (
    Unit("b.0.qkv", tuple(LinearSpec(f"b.0.{name}", 64, 64, 0, "b.0.qkv", 2) for name in "qkv")),
    Unit("b.0.o", (LinearSpec("b.0.o", 64, 128, 0, "b.0.o", 2),)),
)
"""Units of the model that plans and costs are read for."""

Target = Callable[[bytes, Path], None]


def header(content: bytes, folder: Path) -> None:
    """A safetensors file, read to its last tensor."""
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(content)
    index = read_index(folder)
    reader = TensorReader(index)
    for name, info in index.tensors.items():
        assert tuple(reader.tensor(name).shape) == info.shape
    assert sum(info.num_bytes for info in index.tensors.values()) <= len(content)


def shard_index(content: bytes, folder: Path) -> None:
    """The index of a sharded checkpoint beside one good shard."""
    (folder / "config.json").write_bytes(b"{}")
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    (folder / "model.safetensors.index.json").write_bytes(content)
    for file in read_index(folder).files:
        assert file.resolve().parent == folder.resolve()


def run_config(content: bytes, folder: Path) -> None:
    """The YAML file of a run."""
    (folder / "run.yaml").write_bytes(content)
    settings = load_config(folder / "run.yaml", {})
    settings.require_one_target()
    str(settings.calibration_weights), settings.metric


def batch(content: bytes, folder: Path) -> None:
    """The YAML file of a batch; the file of each job gives the job again."""
    (folder / "jobs.yaml").write_bytes(content)
    jobs = read_batch(folder / "jobs.yaml", None, None, overwrite=False).jobs
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs[:3]:
        assert Path(job.config.output or "").name == job.name and "/" not in job.name
        (folder / "job.yaml").write_text(job.yaml(), encoding="utf-8")
        assert load_config(folder / "job.yaml", {}) == job.config


def any_yaml(content: bytes, folder: Path) -> None:
    """YAML of any content."""
    try:
        parse_yaml(content)
    except ParseError as error:
        raise HawqError(str(error)) from error


def model_config(content: bytes, folder: Path) -> None:
    """A checkpoint's config.json, also written again as into the output."""
    from hawqtool.export.writer import write_config

    (folder / "config.json").write_bytes(content)
    read_config(folder)
    (folder / "output").mkdir()
    write_config(folder, folder / "output", {})


def plan(content: bytes, folder: Path) -> None:
    """plan.json, edited by hand."""
    (folder / "plan.json").write_bytes(content)
    found = read_plan(folder / "plan.json", UNITS)
    assert found.stored_bytes > 0 and all(2 <= fmt.bits <= 8 for fmt in found.formats.values())


def sensitivity(content: bytes, folder: Path) -> None:
    """sensitivity.json."""
    (folder / "sensitivity.json").write_bytes(content)
    table, units, unquantized = read_sensitivity(folder / "sensitivity.json")
    assert unquantized >= 0 and all(unit.num_weights > 0 for unit in units)
    values = [s.value for units in table.scores.values() for labels in units.values() for s in labels.values()]
    assert all(abs(value) < float("inf") for value in values)


def costs(content: bytes, folder: Path) -> None:
    """A file of second costs, as JSON and as CSV."""
    for name in ("costs.json", "costs.csv"):
        (folder / name).write_bytes(content)
    failures = []
    for name in ("costs.json", "costs.csv"):
        try:
            CostTable(folder / name)
        except HawqError as error:
            failures.append(error)
    if len(failures) == 2:
        raise failures[0]


def card(content: bytes, folder: Path) -> None:
    """The source's model card, merged into ours; nothing in it is an error."""
    text = content.decode("utf-8", errors="replace")
    front = merged(read_source(text), "base", "LlamaForCausalLM")
    assert front.startswith("---\n") and front.count("\n---\n") == 1
    for shown in (printable(text), one_line(text), escape(text), code(text)):
        assert shown.isprintable()
    assert "<" not in escape(text)
    fence = fenced(text, "text").splitlines()[0].removesuffix("text")
    assert fence not in text


TARGETS: dict[str, Target] = {
    "header": header,
    "shard_index": shard_index,
    "run_config": run_config,
    "batch": batch,
    "any_yaml": any_yaml,
    "model_config": model_config,
    "plan": plan,
    "sensitivity": sensitivity,
    "costs": costs,
    "card": card,
}


def empty(folder: Path) -> None:
    """Make a folder that holds nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def check(target: Target, content: bytes, folder: Path) -> bool:
    """Run a target in an empty folder; whether it took the input.

    Raises:
        AssertionError: If its error is not one short line.
        Exception: Whatever else the target raised, which is what fuzzing looks for.
    """
    try:
        target(content, folder)
    except HawqError as error:
        line = printable(str(error).replace(str(folder), ""))  # as the command line prints it
        assert line.isprintable() and len(line) <= LONGEST_MESSAGE, f"{len(line)} characters: {line[:200]}"
        return False
    return True
