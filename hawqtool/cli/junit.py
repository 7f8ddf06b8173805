"""A run and its gates as a JUnit report, which CI systems show."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from hawqtool.cli.terminal import Terminal
from hawqtool.errors import NumericalError, QualityError
from hawqtool.report.escape import one_line
from hawqtool.report.schema import Gate
from hawqtool.report.wording import gate_found

_LONGEST = 2000


@dataclass
class RunRecord:
    """What a run tells of itself while it goes on.

    Args:
        model: Its model, once the configuration is known.
        gates: Records of its gates, once they are judged.
    """

    model: str = ""
    gates: list[Gate] = field(default_factory=list)


@contextmanager
def recorded_run(path: Path | None, terminal: Terminal) -> Iterator[RunRecord]:
    """Write a JUnit report of what happens inside, however that ends.

    Raises:
        UsageError: If the file cannot be created.
        NumericalError: If writing it fails after a run that went well; after another the reason of that stays.
    """
    record, begin = RunRecord(), time.monotonic()
    if path is None:
        yield record
        return
    from hawqtool.pipeline.run.files import check_writable, write_text

    check_writable(path, "--junit")
    try:
        yield record
    except BaseException as error:
        try:
            write_text(path, junit_text(record, error, time.monotonic() - begin))
        except OSError as full:
            terminal.warn(f"--junit {path} could not be written: {full}")
        raise
    try:
        write_text(path, junit_text(record, None, time.monotonic() - begin))
    except OSError as full:
        raise NumericalError(f"--junit {path} could not be written: {full}; the output is complete") from full


def junit_text(record: RunRecord, error: BaseException | None, seconds: float) -> str:
    """One test suite: a test case for the run, which an error ends, and one for every gate, which can fail.

    Args:
        record: The run.
        error: What ended it early; a failed gate did not.
        seconds: Its duration.
    """
    broke = error is not None and not isinstance(error, QualityError)
    failed = [gate for gate in record.gates if not gate["passed"]]
    suite = ElementTree.Element("testsuite", name="hawqtool quantize", tests=str(1 + len(record.gates)))
    suite.attrib |= {"failures": str(len(failed)), "errors": str(int(broke)), "skipped": "0", "time": f"{seconds:.3f}"}
    name = f"quantize {one_line(record.model)}".strip()
    case = ElementTree.SubElement(suite, "testcase", classname="hawqtool.run", name=name, time=f"{seconds:.3f}")
    if error is not None and broke:
        kind = type(error).__name__.strip("_")
        # Names from a checkpoint may hold what XML does not allow.
        ElementTree.SubElement(case, "error", type=kind, message=one_line(error, _LONGEST) or kind)
    for gate in record.gates:
        case = ElementTree.SubElement(suite, "testcase", classname="hawqtool.gates", name=gate["name"], time="0")
        if not gate["passed"]:
            ElementTree.SubElement(case, "failure", type="gate", message=gate_found(gate))
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'
