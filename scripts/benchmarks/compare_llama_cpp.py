"""Compare hawqtool's GGUF files with llama.cpp's own quantizer at equal sizes: KL on several texts, paired by rows.

    python scripts/benchmarks/compare_llama_cpp.py MODEL --template MODEL.gguf --calibration A.txt \
        --eval-data B.txt C.txt --mixes Q2_K Q3_K_M

Each mix of llama-quantize is made by ggml's quantizer (from the xllamacpp wheel) with an importance matrix of the same
calibration rows, and its size is the target of ours. Both are judged by our dequantization in float32. ``--mixes``
takes types too, such as Q4_0: all tensors then have it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES, BlockType  # noqa: E402
from hawqtool.checkpoint.reader import TensorReader  # noqa: E402
from hawqtool.config import load_config  # noqa: E402
from hawqtool.evaluation.divergence import paired_difference  # noqa: E402
from hawqtool.export.gguf.writer import GgufWriter  # noqa: E402
from hawqtool.pipeline.gguf.conversion import run_gguf  # noqa: E402
from hawqtool.pipeline.gguf.evaluation import GgufEvaluator  # noqa: E402
from hawqtool.pipeline.gguf.tensors import GgufJob, prepare_gguf  # noqa: E402
from hawqtool.pipeline.run.context import RunContext  # noqa: E402
from hawqtool.pipeline.stages.rows import evaluation_rows, gather_rows  # noqa: E402
from hawqtool.runtime.reporter import Silent  # noqa: E402
from hawqtool.streaming.dealt import Groups  # noqa: E402
from hawqtool.streaming.input_statistics import collect_statistics  # noqa: E402

MIXES = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
"""Mixes of llama-quantize and the type that most of their tensors have."""

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama-quantize takes where rows are no whole blocks of 256."""


def main() -> int:
    """Make both files for every mix and print a table."""
    arguments = _parse()
    quantizer, base = Quantizer(), _settings(arguments)
    gguf = prepare_gguf(load_config(None, base | {"target_bpw": 16.0}), Silent())
    importance = imatrix(gguf)
    print(f"{arguments.model.name}, {arguments.num_samples} x {arguments.seq_len} tokens, device {gguf.job.device}")
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        for mix in arguments.mixes:
            theirs, ours = Path(scratch) / f"{mix}.theirs.gguf", Path(scratch) / f"{mix}.ours.gguf"
            types = mixed_types(gguf, mix)
            start = time.perf_counter()
            write_theirs(gguf, types, importance, quantizer, theirs)
            seconds = time.perf_counter() - start
            ends = {name: types[name].name for name in gguf.ends}
            more = {"target_size": f"{theirs.stat().st_size}B", "embedding_type": next(iter(ends.values()), "keep")}
            found = run_gguf(load_config(None, base | more | {"output": str(ours), "eval": False}), Silent())
            sizes = f"{theirs.stat().st_size:,} and {found['bytes']:,} bytes, {found['bpw']:.3f} bits a weight"
            print(f"{mix}: theirs and ours {sizes}; {seconds:.0f} and {found['seconds']:.0f} s")
            for text in arguments.eval_data:
                _judge(gguf, text, arguments.eval_samples, theirs, ours)
            print(f"  types {json.dumps(counted(found['types']))} against {json.dumps(counted(types))}", flush=True)
            for path in (theirs, ours):
                path.unlink()
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
    }


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
        weight = weight.contiguous()
        stored = torch.empty(kind.num_bytes(weight.numel()), dtype=torch.uint8)
        pointer = ctypes.c_void_p(None if importance is None else importance.contiguous().data_ptr())
        rows, columns = (ctypes.c_int64(extent) for extent in weight.shape)
        source, target = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(stored.data_ptr())
        self._library.ggml_quantize_init(kind.number)
        self._library.ggml_quantize_chunk(kind.number, source, target, ctypes.c_int64(0), rows, columns, pointer)
        return stored.view(len(weight), -1)


def imatrix(gguf: GgufJob) -> dict[str, Tensor]:
    """Mean square of every input of every linear on the calibration rows, ``[in]`` float32 by name."""
    job, found = gguf.job, dict[str, Tensor]()
    rows = gather_rows(RunContext(job))["calibration"].tokens
    stream = job.stream()
    activations = stream.embed(rows, job.settings.batch_size)
    for spec in job.structure.blocks:
        with stream.block(spec.index) as block:

            def visit(groups: Groups) -> None:
                for group, statistics in groups:
                    found.update({linear.name: statistics.gram.diagonal().float().cpu() for linear in group})

            collect_statistics(block, activations, visit)
    return found


def mixed_types(gguf: GgufJob, mix: str) -> dict[str, BlockType]:
    """Types by tensor as llama-quantize chooses them (its rule for dense models, with fallbacks)."""
    blocks, tensors = len(gguf.job.structure.blocks), gguf.template.tensors
    config = gguf.job.skeleton.config
    grouped = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    found = {}
    for name in [unit.name for unit in gguf.job.units] + list(gguf.ends):
        wanted = _wanted(name, mix, blocks, grouped)
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


def _judge(gguf: GgufJob, text: Path, samples: int, theirs: Path, ours: Path) -> None:
    rows = evaluation_rows(gguf.job, str(text), samples)
    evaluator = GgufEvaluator(RunContext(gguf.job), {"report": rows}, gguf.places)
    other, own = (evaluator.evaluate(path, path.name)["report"] for path in (theirs, ours))
    mean, error = paired_difference(own, other)
    print(
        f"  {text.name}: KL theirs {other.divergence:.4f}, ours {own.divergence:.4f}, difference {mean:+.4f} ± "
        f"{error:.4f} ({100 * mean / other.divergence:+.1f} %)"
    )


def counted(types: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors have each type."""
    names = [getattr(kind, "name", kind) for kind in types.values()]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    raise SystemExit(main())
