"""Load trial: whether transformers loads a written folder, as the result of having done it.

A child process loads the folder as a user would and makes one forward pass; its outputs must agree with those of our
own walk over the unpacked weights. The start of the process takes about five seconds, so a run tries the shipped folder
only, and on a GPU, where the host waits for the device, the process starts with the run and gets ready beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawqtool.model.block_list import example_row
from hawqtool.model.skeleton import token_embedding
from hawqtool.model.tasks import model_images
from hawqtool.pipeline.load_trial.child import OUTPUTS, PROBLEMS, ROWS
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.run.memory_budget import AUTO, memory_limit
from hawqtool.records import Rows
from hawqtool.runtime.background import beside
from hawqtool.runtime.lifeline import Lifeline

SWITCH = "HAWQTOOL_LOAD_TRIAL"
"""Environment variable that switches the trial off when it is 0; the report then says that nothing was tried."""

MAX_DIFFERENCE = 0.1
"""Relative difference of outputs, at most, as the median over positions: 16-bit arithmetic gives one or two percent,
and experts that a rounding error exchanges are few; a wrongly loaded weight gives one about as large as the outputs."""

_TOKENS, _FEW_TOKENS = 32, 128
_CPU = "cpu"

_GPU_SHARE = 0.25
"""Share of a GPU's free memory that the original's weights may take where the trial computes there: packed and unpacked
ones lie side by side for a moment, and the evaluation needs room as well."""

_SECONDS = 900
_LONGEST_REASON = 200
_KIB = 1024


@dataclass(frozen=True)
class LoadTrial:
    """Result of a trial.

    Args:
        loads: Whether the folder loads and computes what it should; None where it was not tried.
        reason: What was seen, or why nothing was tried.
        problems: What verification in the process found; None where it was not asked for, or came to no end.
    """

    loads: bool | None
    reason: str
    problems: tuple[str, ...] | None = None


class TrialProcess:
    """A child process that imports what a trial needs and then waits to be told what to load; a context manager.

    Left without an order, or by a parent that died, it ends by itself.

    Args:
        class_name: Class of the model that it will load.
        device: Where it will compute, most likely.
        sees_gpus: Whether it may be told to compute on one.

    Attributes:
        device: As given.
        is_ready: Whether it can be given an order; it takes one.
    """

    def __init__(self, class_name: str, device: str = _CPU, sees_gpus: bool = False) -> None:
        self.device, self.is_ready = device, True
        self._ready_for = (class_name, device)
        self._environment = _environment() if sees_gpus else {**_environment(), "CUDA_VISIBLE_DEVICES": ""}

    def __enter__(self) -> Self:
        self._line = Lifeline().__enter__()
        self._child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child", *self._ready_for],
            env={**self._environment, **self._line.environment},
            pass_fds=(self._line.descriptor,),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()  # after `run` it has ended
        self._child.__exit__(kind, error, trace)
        self._line.__exit__(kind, error, trace)

    def run(self, order: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        """Have it load a folder and wait until it ends.

        Args:
            order: Arguments of the child's `main`.

        Raises:
            subprocess.TimeoutExpired: If it takes longer than a trial may.
        """
        self.is_ready = False
        _, told = self._child.communicate(json.dumps(list(order)).encode(), timeout=_SECONDS)
        return subprocess.CompletedProcess(order, self._child.returncode, b"", told)


@contextmanager
def started_ahead(job: Job) -> Iterator[TrialProcess | None]:
    """The process of a run's trial, which starts while the device computes; None on a CPU or where nothing is tried."""
    if job.device.type != "cuda" or _not_possible(job) is not None:
        yield None
        return
    with TrialProcess(_class(job), _device(job), sees_gpus=not job.config.special_formats) as process:
        yield process


def try_loading(
    job: Job,
    folder: Path,
    rows: Tensor,
    process: TrialProcess | None = None,
    verifies: bool = False,
    until_idle: Callable[[], object] = lambda: None,
) -> LoadTrial:
    """Load a folder in transformers in a process of its own and compare one forward pass.

    Args:
        job: The original model.
        folder: A written folder with its small files.
        rows: Tokens ``[rows, seq_len]``, images or sounds; the first row's beginning is used.
        process: The process, where it was started ahead; one that has had its order, of an attempt for which memory
            was short, is not asked again.
        verifies: Whether the process verifies the folder too, where it computes on a GPU: having an interpreter of its
            own, it keeps nobody waiting.
        until_idle: Waits until this process has time for a walk of its own.
    """
    obstacle = _not_possible(job)
    if obstacle is not None:
        return LoadTrial(None, f"not tried: {obstacle}")
    row = rows[:1] if rows.is_floating_point() else rows[:1, :_TOKENS]
    row = row.cpu().contiguous()
    versions = f"transformers {metadata.version('transformers')}, compressed-tensors {_compressed_tensors()}"
    with tempfile.TemporaryDirectory(prefix="hawqtool-load-") as place:
        save_file({"rows": row}, Path(place) / ROWS)
        device = _device(job)
        original = str(job.index.folder) if verifies and device != _CPU else ""
        order = [str(folder), _class(job), str(int(job.source.runs_code)), place]
        order += [json.dumps(model_images(job.skeleton)), original]

        def own() -> Tensor:
            until_idle()
            return _own_outputs(job, folder, row)

        outputs_here = beside(own) if job.device.type == "cuda" else own
        try:
            done = _run_somewhere(order, device, process)
        except subprocess.TimeoutExpired:
            return LoadTrial(None, f"not tried to the end: it took more than {_SECONDS} s")
        if done.returncode:
            return LoadTrial(False, f"tried with {versions}: {_last_line(done.stderr, done.returncode)}")
        outputs, problems = load_file(Path(place) / OUTPUTS)["outputs"], _problems(Path(place) / PROBLEMS)
    difference = _difference(outputs_here(), outputs)
    if not difference <= MAX_DIFFERENCE:
        found = f"its outputs differ by {difference:.2g} from those of the written weights"
        return LoadTrial(False, f"tried with {versions}: it loads, but {found}", problems)
    agrees = f"one forward pass agrees to {difference:.1g} (relative, median)"
    return LoadTrial(True, f"tried on this folder with {versions}: {agrees}", problems)


def _problems(file: Path) -> tuple[str, ...] | None:
    """What verification found; None where it wrote nothing, as it did not come to an end."""
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _class(job: Job) -> str:
    return type(job.skeleton).__name__


def _device(job: Job) -> str:
    """Where the child computes: on the run's GPU where all weights take little of what is free, else on the CPU.

    There unpacking the codes of an 8B model takes a hundred seconds of a core. Floats are compared on the CPU alone,
    as a GPU may have kernels of its own for them, of other sums.
    """
    if job.device.type != "cuda" or job.config.max_memory != AUTO or job.config.special_formats:
        return _CPU
    if not _has_room(job):
        torch.cuda.empty_cache()  # what this process keeps for later is no room for another
    return str(job.device) if _has_room(job) else _CPU


def _has_room(job: Job) -> bool:
    free, _ = torch.cuda.mem_get_info(job.device)
    return job.index.total_bytes <= _GPU_SHARE * free


def _run_somewhere(
    order: Sequence[str], device: str, process: TrialProcess | None
) -> subprocess.CompletedProcess[bytes]:
    """What the process says and its exit code; what fails where a GPU, which others may fill, is in it is tried again.

    That is done on the CPU by a process of its own: one that got ready ahead may have failed at that already.
    """
    done = _run([*order, device], process)
    is_final = not done.returncode or (device == _CPU and process is None)
    return done if is_final else _run([*order[:-1], "", _CPU], None)


def _run(order: Sequence[str], process: TrialProcess | None) -> subprocess.CompletedProcess[bytes]:
    if process is not None and process.is_ready:
        return process.run(order)
    _, class_name, *_, device = order
    with TrialProcess(class_name, device, sees_gpus=device != _CPU) as begun:
        return begun.run(order)


def trial_rows(job: Job, sets: Mapping[str, Rows]) -> Tensor:
    """Rows for a trial: those of the run, or where it read none, numbers that its inputs may be."""
    for role in ("report", "calibration"):
        if role in sets:
            return sets[role].tokens
    generator = torch.Generator().manual_seed(0)
    form, positions = job.row_format, min(_TOKENS, job.settings.seq_len)
    values = torch.randn(example_row(job.skeleton, tokens=positions).shape, generator=generator)
    if form.tokens is None:
        return values
    known, _ = token_embedding(job.skeleton) or (_FEW_TOKENS, None)
    tokens = torch.randint(known, (1, positions), generator=generator)
    tokens = torch.cat([torch.tensor([form.image]).long(), tokens], 1)
    return form.join(tokens, form.split(values)[str(form.values)]) if form.is_joint else tokens


def _not_possible(job: Job) -> str | None:
    """Why the trial cannot be made."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if util.find_spec("compressed_tensors") is None:
        return "compressed-tensors is not installed"
    # Unpacked weights beside packed ones, and what a forward pass takes; twice as much in float32.
    rounds = job.config.kv_cache != "none" or any(fmt.activations for fmt in job.config.special_formats)
    needed = (4 if rounds else 2) * job.index.total_bytes
    free = _free_memory()
    limit = memory_limit(job.config, job.device) if job.device.type == "cpu" else None
    if needed > min(free, free if limit is None else limit):
        return f"it needs about {needed:,} bytes of memory, more than the run may take or is free"
    return None


def _free_memory() -> int:
    """Bytes that can be had without swapping; where the system does not tell, those that nothing uses."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * _KIB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _compressed_tensors() -> str:
    return metadata.version("compressed-tensors")


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _last_line(stderr: bytes, code: int) -> str:
    """What a traceback says behind its last call, shortened to the first line of it."""
    lines = [line.rstrip() for line in stderr.decode("utf-8", errors="replace").splitlines() if line.strip()]
    last_call = max((number for number, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    said = [line for line in lines[last_call + 1 :] if not line.startswith(" ")] or [
        line.strip() for line in lines[-1:]
    ]
    text = said[0] if said and code > 0 else f"the process ended with {code}"
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _own_outputs(job: Job, folder: Path, row: Tensor) -> Tensor:
    """Outputs of our own walk over the folder, in float32 where inputs or the cache are rounded, as the child's are."""
    stream = job.packed_stream(folder)
    if (stream.input_formats or stream.cache.attentions) and job.dtype != torch.float32:
        stream = job.packed_stream(folder, torch.float32)
    stream.cache = replace(stream.cache, queries=False)  # compressed-tensors rounds what is cached alone
    with torch.no_grad():
        states = stream.final_hidden(row, 1, lambda _: None)
        return stream.outputs(row, states).float().cpu()


def _difference(own: Tensor, other: Tensor) -> float:
    """Relative difference ``|a - b| / |a|`` by position, the median; logits count up to a constant of a position."""
    first, second = (values.double().reshape(-1, values.shape[-1]) for values in (own, other))
    if first.shape != second.shape:
        return float("inf")
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    relative = (first - second).norm(dim=-1) / first.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(relative.median())
