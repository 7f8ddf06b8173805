"""Compare our rounding to block types with ggml's own, one layer at a time: errors of outputs on held-out rows.

    python scripts/research/compare_block_types.py MODEL --calibration A.txt --blocks 1 8 20 --types Q2_K Q4_0

Both round the original's weights: ggml with an importance matrix of the rows that are not held out (three of four),
ours by the Gram matrix of the same rows, to nearest and with compensation. Needs the xllamacpp wheel. The first rows of
large matrices are taken. A line of JSON for each linear and type, errors relative to the squared outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from compare_llama_cpp import Quantizer  # noqa: E402
from hawqtool.checkpoint.gguf.block_codec import block_grid, dequantize_blocks, grid_values  # noqa: E402
from hawqtool.checkpoint.gguf.block_types import BLOCK_TYPES  # noqa: E402
from hawqtool.config import load_config  # noqa: E402
from hawqtool.pipeline.run.context import RunContext  # noqa: E402
from hawqtool.pipeline.run.job import prepare  # noqa: E402
from hawqtool.pipeline.stages.rows import gather_rows  # noqa: E402
from hawqtool.rounding.blocks.block_search import search_blocks  # noqa: E402
from hawqtool.rounding.blocks.spec import round_blocks  # noqa: E402
from hawqtool.rounding.factor import factorize  # noqa: E402
from hawqtool.rounding.gram import quadratic_form  # noqa: E402
from hawqtool.rounding.spec import InputGroups  # noqa: E402
from hawqtool.rounding.statistics import GroupStatistics  # noqa: E402
from hawqtool.streaming.input_statistics import collect_statistics  # noqa: E402


def main() -> int:
    """Walk the model and print the errors of the blocks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=list(BLOCK_TYPES), choices=list(BLOCK_TYPES))
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=576, help="rows of a matrix that are rounded")
    options = parser.parse_args()
    settings = {"model": options.model, "calibration": (options.calibration,), "profile": "transformers", "eval": False}
    settings |= {"num_samples": options.num_samples, "seq_len": options.seq_len, "target_bpw": 4.0}
    job, quantizer = prepare(load_config(None, settings), writes=False), Quantizer()
    rows = gather_rows(RunContext(job))["calibration"]
    stream = job.stream()
    activations = stream.embed(rows.tokens, job.settings.batch_size, True)
    for spec in job.structure.blocks[: max(options.blocks) + 1]:
        with stream.block(spec.index) as block:

            def visit(groups: InputGroups) -> None:
                for group, statistics in groups:
                    for linear in group if spec.index in options.blocks else ():  # noqa: B023
                        weight = block.weight(linear)[: options.rows].float()  # noqa: B023
                        compared(linear.name, weight, statistics, options.types, quantizer)

            collect_statistics(block, activations, visit)
    return 0


def compared(
    name: str, weight: Tensor, statistics: GroupStatistics, types: Sequence[str], quantizer: Quantizer
) -> None:
    """Print the errors of one weight ``[out, in]`` in some types."""
    fitting, held_out = statistics.fitting, statistics.held_out
    assert fitting is not None and held_out is not None  # the rows are held out
    factor = factorize(fitting.gram, fitting.num_tokens, name=name)
    importance, power = fitting.gram.diagonal().cpu().contiguous(), quadratic_form(weight, held_out.gram)
    for kind in (BLOCK_TYPES[name] for name in types):
        if not kind.divides(weight.shape[1]):
            continue
        plain, looped = (
            search_blocks(weight, factor.diagonal, kind),
            round_blocks(weight, factor.diagonal, factor, kind),
        )
        values = {
            "ggml": dequantize_blocks(quantizer(weight.cpu(), kind, importance), kind).to(weight.device),
            "nearest": grid_values(plain.codes, block_grid(plain, kind), kind),
            "compensated": grid_values(looped.codes, block_grid(looped, kind), kind),
        }
        errors = {way: float(quadratic_form(found - weight, held_out.gram) / power) for way, found in values.items()}
        print(json.dumps({"linear": name, "type": kind.name, **errors}), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
