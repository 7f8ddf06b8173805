"""Compare hawqtool's GGUF files with llama.cpp's own quantizer at equal sizes: KL on several texts, paired by rows.

    python scripts/benchmarks/compare_llama_cpp.py MODEL --template MODEL.gguf --calibration A.txt \
        --eval-data B.txt C.txt --mixes Q2_K Q3_K_M --json OUT.jsonl

Each mix of llama-quantize is made by ggml's quantizer (from the xllamacpp wheel) with an importance matrix of the same
calibration rows, and its size is the target of ours. ``--same-types`` adds our rounding of their types, which tells
rounding from choice. All are judged by our dequantization in float32. ``--mixes`` takes types too, such as Q4_0: all
tensors then have it. Scores are measured once for all mixes. Each line of the file has the KL of every row.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType  # noqa: E402
from hawqtool.checkpoint.reader import TensorReader  # noqa: E402
from hawqtool.config import load_config  # noqa: E402
from hawqtool.evaluation.divergence import paired_difference  # noqa: E402
from hawqtool.export.gguf.writer import GgufWriter  # noqa: E402
from hawqtool.pipeline.gguf.evaluation import GgufEvaluator  # noqa: E402
from hawqtool.pipeline.gguf.imatrix import input_power  # noqa: E402
from hawqtool.pipeline.gguf.planner import make_gguf_planner, stored_budget  # noqa: E402
from hawqtool.pipeline.gguf.tensors import EMBEDDING, OUTPUT, GgufJob, prepare_gguf  # noqa: E402
from hawqtool.pipeline.gguf.trials import GgufTrials  # noqa: E402
from hawqtool.pipeline.run.context import RunContext  # noqa: E402
from hawqtool.pipeline.stages.rows import evaluation_rows, gather_rows  # noqa: E402
from hawqtool.pipeline.stages.token_importance import with_token_importance  # noqa: E402
from hawqtool.records import BitPlan, Evaluation, Score, UnitFormats  # noqa: E402
from hawqtool.runtime.reporter import Silent  # noqa: E402

MIXES = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
"""Mixes of llama-quantize and the type that most of their tensors have."""

_ROWS = 1024
"""Rows that a thread quantizes at a time."""

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama-quantize takes where rows are no whole blocks of 256."""


def main() -> int:
    """Make the files for every mix, print a table and write its figures."""
    arguments = _parse()
    gguf = prepare_gguf(load_config(None, _settings(arguments) | {"target_bpw": 16.0}), Silent())
    print(f"{arguments.model.name}, {arguments.num_samples} x {arguments.seq_len} tokens, device {gguf.job.device}")
    comparison = _Comparison(arguments, gguf)
    for mix in arguments.mixes:
        comparison.run(mix)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, nargs="+", required=True)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=[*MIXES, *BLOCK_TYPES])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, help="rows of a pass")
    parser.add_argument("--max-memory", default="auto", help="of the device, such as 16GiB")
    parser.add_argument("--same-types", action="store_true", help="round their types with our rounding too")
    parser.add_argument("--json", type=Path, default=None, help="file that gets a line per mix and text")
    parser.add_argument("--keep", type=Path, default=None, help="folder to which our files go, named by their mix")
    parser.add_argument("--work", type=Path, default=None, help="folder for the files while they are judged")
    return parser.parse_args()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(arguments.model),
        "to": "gguf",
        "template": str(arguments.template),
        "calibration": (str(arguments.calibration),),
        "num_samples": arguments.num_samples,
        "seq_len": arguments.seq_len,
        "batch_size": arguments.batch_size,
        "max_memory": arguments.max_memory,
        "eval": False,
    }


class _Comparison:
    """What all mixes of a model share: rows, importance matrix, scores, the original's outputs."""

    def __init__(self, arguments: argparse.Namespace, gguf: GgufJob) -> None:
        self.arguments, self.gguf, start = arguments, gguf, time.perf_counter()
        self.quantizer, context = Quantizer(), RunContext(gguf.job)
        sets = gather_rows(context)
        power = input_power(gguf, sets["calibration"])
        self.importance = {name: seen.mean for name, seen in power.items()}
        self.calibration = with_token_importance(context, sets["calibration"])
        self.planner = make_gguf_planner(context, gguf, sets, self.calibration)
        texts = {
            text.stem: evaluation_rows(gguf.job, str(text), arguments.eval_samples) for text in arguments.eval_data
        }
        # On a GPU too in float32: the differences of good files are as small as the roundings of bfloat16.
        judging = replace(gguf.job, dtype=torch.float32, matrices=WeakValueDictionary())
        self.evaluator = GgufEvaluator(RunContext(judging), texts, gguf.places)
        ends = {name: _values(found) for name, found in self.planner.ends.scores.items()}
        print(
            f"measured in {time.perf_counter() - start:.0f} s; embedding and output lose {json.dumps(ends)}", flush=True
        )

    def run(self, mix: str) -> None:
        """Make the files of a mix and judge them."""
        types = mixed_types(self.gguf, mix)
        with tempfile.TemporaryDirectory(dir=self.arguments.work) as scratch:
            theirs, start = Path(scratch) / "theirs.gguf", time.perf_counter()
            write_theirs(self.gguf, types, self.importance, self.quantizer, theirs)
            seconds = {"theirs": time.perf_counter() - start}
            config = self.gguf.job.config.model_copy(
                update={"target_bpw": None, "target_size": f"{theirs.stat().st_size}B"}
            )
            budget = stored_budget(replace(self.gguf, job=replace(self.gguf.job, config=config)))
            plans = {"ours": self.planner.plan(budget)}
            if self.arguments.same_types:
                plans["same_types"] = _plan_of(self.gguf, types)
            found, files = {"theirs": self._judged(theirs)}, {"theirs": theirs}
            for name, plan in plans.items():
                start, trials = time.perf_counter(), self._trials(Path(scratch))
                files[name] = trials.run(plan).path
                seconds[name] = time.perf_counter() - start
                found[name] = self._judged(files[name])
            self._tell(mix, found, {name: path.stat().st_size for name, path in files.items()}, seconds)
            if self.arguments.keep is not None:
                shutil.copy(files["ours"], self.arguments.keep / f"{mix}.gguf")
        kinds = json.dumps(counted(plans["ours"].formats))
        print(f"  types {kinds} against {json.dumps(counted(types))}", flush=True)

    def _trials(self, folder: Path) -> GgufTrials:
        return GgufTrials(RunContext(self.gguf.job), self.planner, {}, self.calibration, folder)

    def _judged(self, path: Path) -> dict[str, Evaluation]:
        return self.evaluator.evaluate(path, path.name)

    def _tell(
        self,
        mix: str,
        found: Mapping[str, Mapping[str, Evaluation]],
        sizes: Mapping[str, int],
        seconds: Mapping[str, float],
    ) -> None:
        took = ", ".join(f"{name} {sizes[name]:,} bytes in {seconds[name]:.0f} s" for name in sizes)
        print(f"{mix}: {took}{_peak()}")
        for text, other in found["theirs"].items():
            line: dict[str, Any] = {"model": self.arguments.model.name, "mix": mix, "text": text}
            shown = [f"theirs {other.divergence:.5f} ± {other.stderr:.5f}"]
            for name, by_text in found.items():
                one = by_text[text]
                line[name] = {"bytes": sizes[name], "kl": one.divergence, "stderr": one.stderr}
                line[name] |= {"perplexity": one.perplexity, "same_top": one.same_top, "rows": list(one.row_divergence)}
                line[name] |= {"seconds": seconds[name]}
                if name != "theirs":
                    mean, error = paired_difference(one, other)
                    line[name] |= {"difference": mean, "difference_stderr": error}
                    share = 100 * mean / other.divergence
                    shown.append(f"{name} {one.divergence:.5f} ({mean:+.5f} ± {error:.5f}, {share:+.1f} %)")
            print(f"  {text}: KL {', '.join(shown)}", flush=True)
            if self.arguments.json is not None:
                with self.arguments.json.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")


def _peak() -> str:
    return f"; at most {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of the GPU" if torch.cuda.is_available() else ""


def _values(scores: Mapping[str, Score]) -> dict[str, float]:
    return {label: round(score.value, 6) for label, score in scores.items()}


def _plan_of(gguf: GgufJob, types: Mapping[str, BlockType]) -> BitPlan:
    stored = sum(types[unit.name].num_bytes(unit.num_weights) for unit in gguf.units)
    # Its file is named by its bytes, which those of ours may be too.
    return BitPlan(cast(UnitFormats, dict(types)), stored + 1, sum(unit.num_weights for unit in gguf.units))


class Quantizer:
    """ggml's quantizer in the shared library of xllamacpp."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("xllamacpp")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("xllamacpp is not installed; pip install xllamacpp==2026.10.11549")
        folder = Path(next(iter(found.submodule_search_locations)))
        self._library = ctypes.CDLL(str(next(folder.glob("*.so"))))
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def __call__(self, weight: Tensor, kind: BlockType, importance: Tensor | None) -> Tensor:
        """Blocks of a weight ``[out, in]`` float32, ``[out, bytes of a row]`` uint8; importance is ``[in]``."""
        self._library.ggml_quantize_init(kind.number)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the library does not hold Python's lock
            parts = pool.map(lambda rows: self._rows(rows, kind, importance), weight.split(_ROWS))
            return torch.cat(list(parts))

    def _rows(self, weight: Tensor, kind: BlockType, importance: Tensor | None) -> Tensor:
        weight = weight.contiguous()
        stored = torch.empty(kind.num_bytes(weight.numel()), dtype=torch.uint8)
        importance = None if importance is None else importance.contiguous()  # it has to live until the call
        pointer = ctypes.c_void_p(None if importance is None else importance.data_ptr())
        rows, columns = (ctypes.c_int64(extent) for extent in weight.shape)
        source, target = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(stored.data_ptr())
        self._library.ggml_quantize_chunk(kind.number, source, target, ctypes.c_int64(0), rows, columns, pointer)
        return stored.view(len(weight), -1)


def mixed_types(gguf: GgufJob, mix: str) -> dict[str, BlockType]:
    """Types by tensor as llama-quantize chooses them (its rule for dense models, with fallbacks)."""
    blocks, tensors = len(gguf.job.structure.blocks), gguf.template.tensors
    config = gguf.job.skeleton.config
    grouped = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    found = {}
    for name in (unit.name for unit in gguf.units):
        wanted = _wanted(name, mix, blocks, grouped)
        if name == EMBEDDING and OUTPUT in tensors:
            wanted = MIXES.get(mix, mix)  # it is not the output
        if tensors[name].shape[-1] % BLOCK_TYPES[wanted].block_size:
            wanted = FALLBACKS[wanted]
        found[name] = BLOCK_TYPES[wanted]
    return found


def _wanted(name: str, mix: str, blocks: int, grouped: int) -> str:
    base = MIXES.get(mix, mix)
    if not name.startswith("blk."):
        return "Q6_K" if mix in MIXES else base
    place, part = int(name.split(".")[1]), name.split(".")[2]
    eighth = blocks // 8
    more = place < eighth or place >= 7 * blocks // 8 or (place - eighth) % 3 == 2
    if mix == "Q2_K":
        return {"attn_v": "Q4_K" if grouped >= 4 else "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}.get(part, base)
    if mix == "Q3_K_M":
        down = "Q5_K" if place < blocks // 16 else "Q4_K" if more else base
        return {"attn_v": "Q5_K" if place < 2 else "Q4_K", "attn_output": "Q4_K", "ffn_down": down}.get(part, base)
    return "Q6_K" if mix in MIXES and more and part in ("attn_v", "ffn_down") else base


def write_theirs(
    gguf: GgufJob, types: Mapping[str, BlockType], importance: Mapping[str, Tensor], quantizer: Quantizer, path: Path
) -> None:
    """Write a file whose tensors ggml has quantized, each from the checkpoint's weights."""
    reader = TensorReader(gguf.job.index)
    with GgufWriter(gguf.template, gguf.layout(types), path) as writer:
        for name, place in gguf.places.items():
            weight = gguf.matrix(name, reader).float()
            stored = quantizer(weight, types[place.tensor], importance.get(name.removesuffix(".weight")))
            stored = stored if place.piece.rows is None else stored[place.piece.rows]
            writer.write(place.tensor, stored, place.first_row)


def counted(types: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors have each type."""
    names = [getattr(kind, "name", kind) for kind in types.values()]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    raise SystemExit(main())
