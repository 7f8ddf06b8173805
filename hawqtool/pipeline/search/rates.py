"""Rates of this machine, measured on the model's own shapes: products, rounding, reading of weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from hawqtool.checkpoint.reader import TensorReader
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.menu import job_menu
from hawqtool.records import LinearSpec
from hawqtool.rounding.factor import factorize
from hawqtool.rounding.floats.scale_search import common_divisor
from hawqtool.rounding.layer import round_layers, round_without_inputs
from hawqtool.rounding.method import Task
from hawqtool.rounding.statistics import GroupStatistics

_SIDE, _BUDGET_SECONDS, _FEWEST_PRODUCTS = {"cpu": 1 << 10, "cuda": 1 << 13}, {"cpu": 0.2, "cuda": 0.03}, 3
"""Rows of the matrix that is multiplied, as a GPU multiplies 1,024 in less time than its host needs to call and wait;
seconds for repetitions, of which a GPU, that nothing else uses, needs few."""
_MOST_WEIGHTS, _MOST_COLUMNS = {"cpu": 1 << 18, "cuda": 1 << 24}, 4096
"""Weights and columns of the layer that is rounded for its rate: enough to keep the device busy, in a part of a
second."""
_FEWEST_READ = 1 << 24
"""Bytes below which the time of reading them says nothing of more."""
_READ_TOGETHER = {"cpu": 1, "cuda": 4}
"""Tensors that are read at a time, about: a GPU's run reads ahead in threads."""


@dataclass(frozen=True)
class Rates:
    """How fast the machine is at what runs consist of.

    Args:
        operations: Floating-point operations per second of a large matrix product.
        rounded: Weights per second of the scale search and the column loop, in one format, losses included.
        read: Bytes per second from the files of the model into the device's memory; infinite where its weights are too
            small to tell, and to matter.
    """

    operations: float
    rounded: float
    read: float


def measured_rates(job: Job) -> Rates:
    """Measure them; a second or two, and as long again where kernels are compiled for the first time on a machine."""
    return Rates(product_rate(job.device, job.dtype), rounding_rate(job), reading_rate(job))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the quickest of those that a fraction of a second has room for.

    The first one, in which libraries load what they need, is not the quickest.
    """
    side = _SIDE[device.type]
    matrix = torch.ones((side, side), device=device, dtype=dtype)
    return 2 * side**3 / _quickest(lambda: float((matrix @ matrix)[0, 0]), device.type)


def rounding_rate(job: Job) -> float:
    """Weights per second of rounding a layer of a typical shape of the model as the run will round it."""
    if not job.units:
        return math.inf
    linear = _typical_linear(job)
    columns = min(linear.in_features, _MOST_COLUMNS)
    rows = max(1, min(linear.out_features, _MOST_WEIGHTS[job.device.type] // columns))
    formats = [fmt for fmt in job_menu(job, None)[linear.unit] if not fmt.is_unquantized]
    if not formats:
        return math.inf
    fmt = next((f for f in formats if f.group_size and columns % f.group_size == 0), formats[0])
    if fmt.floats is not None:
        rows -= rows % fmt.floats.group_rows  # which divide the outputs
    generator = torch.Generator(job.device).manual_seed(0)
    drawn = partial(torch.randn, generator=generator, device=job.device, dtype=torch.float32)
    weight = drawn((rows, columns))
    divisor = common_divisor([weight]) if fmt.floats is not None and fmt.floats.scale == "e4m3" else None
    task = Task(linear.name, weight, fmt, job.stored_dtypes[linear.name], divisor=divisor)
    method = job.settings.method
    if not job.config.reads_rows:
        return rows * columns / _quickest(lambda: round_without_inputs([task], method), job.device.type, fewest=2)
    statistics = _statistics(job, drawn((columns, columns)))
    factor = factorize(statistics.gram, statistics.num_tokens, method.damping, name=linear.name)
    rounding = partial(round_layers, [task], statistics, factor, method)
    return rows * columns / _quickest(rounding, job.device.type, fewest=2)


def _statistics(job: Job, inputs: torch.Tensor) -> GroupStatistics:
    """Statistics of some inputs, of all the kinds that the method looks at."""
    method, gram, count = job.settings.method, inputs.T @ inputs / len(inputs), 8 * len(inputs)
    drift = torch.zeros_like(gram) if method.needs_drift else None
    weighted = job.settings.uses_token_importance
    held = GroupStatistics(gram.clone(), count // 4, count // 4, drift, weighted=weighted)
    return GroupStatistics(gram, count, count, drift, held if method.needs_held_out else None, weighted)


def reading_rate(job: Job) -> float:
    """Bytes per second of reading weights into the device's memory, and rotating them where that is done.

    It is that of the largest linear of the first block.
    """
    names = [linear.name for linear in job.structure.blocks[0].linears]
    reader = TensorReader(job.index, device=job.device)
    stored = [f"{name}.weight" for name in names if f"{name}.weight" in reader]
    if not stored:
        return math.inf
    name = max(stored, key=lambda name: job.index.tensors[name].num_bytes)
    if job.index.rotation is not None:
        reader.tensor(name)  # compiles
    start = time.perf_counter()
    tensor = reader.tensor(name).to(job.device)
    float(tensor.flatten()[-1])  # a copy to a GPU is waited for
    size = tensor.nbytes
    seconds = time.perf_counter() - start
    return _READ_TOGETHER[job.device.type] * size / seconds if size >= _FEWEST_READ else math.inf


def _typical_linear(job: Job) -> LinearSpec:
    """The linear whose shape most weights of the model have."""
    members = [member for unit in job.units for member in unit.members]
    totals: dict[tuple[int, int], int] = {}
    for member in members:
        shape = member.out_features, member.in_features
        totals[shape] = totals.get(shape, 0) + member.num_weights
    return next(m for m in members if (m.out_features, m.in_features) == max(totals, key=lambda s: totals[s]))


def _quickest(work: Callable[[], object], device: str, fewest: int = _FEWEST_PRODUCTS) -> float:
    """Seconds of the quickest of some repetitions: at least so many, more while a fraction of a second has room."""
    began, best, count = time.perf_counter(), math.inf, 0
    while count < fewest or time.perf_counter() - began < _BUDGET_SECONDS[device]:
        start = time.perf_counter()
        work()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best
