"""The stages of a run, each through the functions that `hawqtool quantize` calls, with its time and memory."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.data.tokens import fingerprint
from hawqtool.errors import NumericalError, UsageError
from hawqtool.export.packed_reader import PackedReader
from hawqtool.export.verify import verify_folder
from hawqtool.export.writer import CheckpointWriter, copy_small_files
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import parse_sensitivity
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import budget_bytes, job_menu, unquantized_bytes
from hawqtool.pipeline.search.planner import Planner
from hawqtool.pipeline.stages.measure import measure_job
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan, LayerMetrics, RoundedLayer, Rows
from hawqtool.report.documents import SensitivityDocument
from hawqtool.runtime.reporter import Silent
from hawqtool.runtime.stage_timer import StageRecorder
from speed.floor import block_floor, importance_floor, measuring_floor, rounding_floor
from speed.memory import PeakMemory
from speed.rates import Rates, evict

STAGES = ("read", "importance", "measure", "allocate", "round", "write", "verify")
T = TypeVar("T")


@dataclass
class Measured:
    """A stage that was run.

    Args:
        stage: Its name.
        seconds: All of it.
        per_block: Seconds of a block, the first one aside where there are others; None where blocks do not count.
        floor: Least seconds of a block; None where none is known.
        host_bytes: Peak anonymous memory of the process.
        device_bytes: Peak memory of tensors on the GPU.
        parts: Seconds of a block by part of the work, and the least that the part can take (None: not known).
    """

    stage: str
    seconds: float
    per_block: float | None
    floor: float | None
    host_bytes: int | None
    device_bytes: int | None
    parts: dict[str, tuple[float, float | None]] = field(default_factory=dict)


class BlockClock(Silent):
    """A reporter that takes the time whenever a block is done."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: dict[str, list[float]] = {}

    def progress(self, stage: str, done: int, total: int) -> None:
        """Take the time."""
        self.moments.setdefault(stage, []).append(time.perf_counter())

    def per_block(self) -> float | None:
        """Seconds of a block, summed over the sweeps, without each sweep's first; None where no sweep has two."""
        sweeps = [moments for moments in self.moments.values() if len(moments) > 1]
        return sum((moments[-1] - moments[0]) / (len(moments) - 1) for moments in sweeps) if sweeps else None


class Benchmark:
    """Runs stages in order on one checkpoint; a stage uses what those before it made.

    Args:
        job: The model.
        rates: Of the machine.
        rows: Rows by role: ``calibration`` behind the rounding, ``measuring`` and ``scoring`` behind the scores.
        folder: Folder for what is written.
    """

    def __init__(self, job: Job, rates: Rates, rows: dict[str, Rows], folder: Path) -> None:
        self.job, self.rates, self.rows, self.folder = job, rates, rows, folder
        self.blocks = len(job.structure.blocks)
        self.plan = uniform_plan(job)
        self._document: SensitivityDocument | None = None
        self._layers: dict[str, Any] | None = None

    def run(self, stage: str) -> Measured:
        """Run a stage."""
        found: Measured = getattr(self, f"_{stage}")()
        return found

    @property
    def experts(self) -> dict[str, int]:
        """Linears of experts that were rounded: all, those without a token, those that were lent some."""
        own = [values for name, values in (self._layers or {}).items() if is_expert(name)]
        if not own:
            return {}
        without = sum(values["num_tokens"] == 0 for values in own)
        return {"in all": len(own), "without tokens": without, "with lent ones": sum(bool(v["fallback"]) for v in own)}

    @property
    def _written(self) -> Path:
        return self.folder / "rounded"

    def _timed(self, stage: str, work: Callable[[], T]) -> tuple[Measured, T]:
        gc.collect()
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        with PeakMemory(self.job.device) as memory:
            start = time.perf_counter()
            result = work()
            if self.job.device.type == "cuda":
                torch.cuda.synchronize(self.job.device)
            seconds = time.perf_counter() - start
        return Measured(stage, seconds, None, None, memory.host_bytes, memory.device_bytes), result

    def _read(self) -> Measured:
        """Every block from the disk to the device, and nothing else."""
        for file in self.job.index.files:
            evict(file)
        stream = self.job.stream()

        def read() -> None:
            for spec in self.job.structure.blocks:
                with stream.block(spec.index):
                    pass

        found, _ = self._timed("read", read)
        found.per_block = found.seconds / self.blocks
        weights = sum(linear.num_weights for linear in self.job.structure.blocks[0].linears)
        found.floor = 2 * weights / min(self.rates.disk_read, self.rates.to_device)
        return found

    def _importance(self) -> Measured:
        """Weights of the tokens; those of the rows behind the scores are made beside the clock."""
        clock = BlockClock()
        recorder = StageRecorder(self.job.device)
        context = RunContext(replace(self.job, recorder=recorder), clock)
        found, self.rows["calibration"] = self._timed(
            "importance", lambda: with_token_importance(context, self.rows["calibration"], for_feedback=True)
        )
        self.rows["measuring"] = with_token_importance(RunContext(self.job), self.rows["measuring"])
        found.per_block = found.seconds / self.blocks
        found.floor = importance_floor(self.job, self.rates, len(self.rows["calibration"].tokens), self._seq_len)
        found.parts = {name: (spent / self.blocks, None) for name, spent in recorder.seconds().items()}
        return found

    def _measure(self) -> Measured:
        menu, clock = job_menu(self.job, self._budget()), BlockClock()
        recorder = StageRecorder(self.job.device)
        sets = {"calibration": self.rows["measuring"], "scoring": self.rows["scoring"]}
        job = replace(self.job, recorder=recorder)
        found, self._document = self._timed("measure", lambda: measure_job(RunContext(job, clock), menu, sets))
        found.per_block = clock.per_block() or found.seconds / self.blocks
        counts = [len(rows.tokens) for rows in sets.values()]
        found.floor = measuring_floor(self.job, self.rates, counts, self._seq_len, menu)
        found.parts = {name: (spent / self.blocks, None) for name, spent in recorder.seconds().items()}
        return found

    def _allocate(self) -> Measured:
        if self._document is None:
            raise UsageError("stage allocate needs the scores of stage measure; name both")
        table = parse_sensitivity(self._document, "the measurement")[0]
        allocator = Planner(RunContext(self.job), table, self._document)
        found, self.plan = self._timed("allocate", lambda: allocator.plan(self._budget()))
        return found

    def _round(self) -> Measured:
        """Round and write by plan: the mixed one where it was made, else the uniform one."""
        shutil.rmtree(self._written, ignore_errors=True)
        recorder, clock = StageRecorder(self.job.device), BlockClock()
        job, rows = replace(self.job, recorder=recorder), self.rows["calibration"]
        found, result = self._timed(
            "round", lambda: round_to_folder(RunContext(job, clock), self.plan, rows, self._written, "benchmark")
        )
        self._layers = result["layers"]
        packed = self.plan.stored_bytes / self.blocks
        floors = rounding_floor(self.job, self.rates, len(rows.tokens), self._seq_len, packed)
        found.per_block = clock.per_block() or found.seconds / self.blocks
        found.floor = block_floor(floors)
        found.parts = {name: (spent / self.blocks, floors.get(name)) for name, spent in recorder.seconds().items()}
        return found

    def _write(self) -> Measured:
        """Pack, hash and write all layers once more, and copy the rest; reading them back is not counted."""
        if self._layers is None:
            raise UsageError("stage write needs the layers of stage round; name both")
        folder = self.folder / "written"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        layout = self.job.layout(self.plan.formats)
        reader, formats = PackedReader(self._written), self.job.layer_formats(self.plan.formats)
        aside = 0.0

        def write() -> None:
            nonlocal aside
            with CheckpointWriter(self.job.index, layout, folder) as writer:
                for name, fmt in formats.items():
                    start = time.perf_counter()
                    codes, scales, zeros, divisor = reader.codes(name)
                    device, metrics = self.job.device, self._metrics(name)
                    codes, scales, zeros = (
                        codes.to(device),
                        scales.to(device),
                        None if zeros is None else zeros.to(device),
                    )
                    aside += time.perf_counter() - start
                    writer.write_layer(RoundedLayer(name, fmt, codes, scales, metrics, zeros, divisor))
                writer.copy_rest()

        found, _ = self._timed("write", write)
        found.seconds -= aside
        found.per_block = found.seconds / self.blocks
        found.floor = layout.total_bytes / self.rates.disk_write / self.blocks
        shutil.rmtree(folder)
        return found

    def _verify(self) -> Measured:
        if not self._written.is_dir():
            raise UsageError("stage verify needs the folder of stage round; name both")
        source, device = self.job.index.folder, self.job.device
        copy_small_files(source, self._written)
        found, report = self._timed("verify", lambda: verify_folder(self._written, source, device, sealed=False))
        if report.problems:
            raise NumericalError(f"the written folder failed verification: {report.problems[0]}")
        found.per_block = found.seconds / self.blocks
        read = report.total_bytes + self.job.index.total_bytes
        found.floor = read / self.rates.disk_read / self.blocks
        return found

    def _metrics(self, name: str) -> LayerMetrics:
        assert self._layers is not None  # the caller saw to it
        return LayerMetrics(**{f.name: self._layers[name][f.name] for f in fields(LayerMetrics)})

    def _budget(self) -> int:
        return budget_bytes(
            self.job.config, self.job.units, unquantized_bytes(self.job, job_menu(self.job, None)), self.job.pins
        )

    @property
    def _seq_len(self) -> int:
        return int(self.rows["calibration"].tokens.shape[1])


def uniform_plan(job: Job) -> BitPlan:
    """All units at 4 bits."""
    formats = uniform_formats(job.units, 4, job.config.base_group_size)
    return BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))


def random_rows(count: int, seq_len: int, vocabulary: int, seed: int) -> Rows:
    """Rows of uniformly random tokens: what they say does not change the time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (count, seq_len), generator=generator)
    return Rows(tokens, "random", fingerprint(tokens))
