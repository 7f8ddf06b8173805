"""What embedding and output lose in each type, beside whole models in float64 whose matrix is the rounded one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hawqtool.checkpoint.gguf.block_codec import block_grid, grid_values
from hawqtool.config import load_config
from hawqtool.pipeline.gguf.ends import measure_ends
from hawqtool.pipeline.gguf.tensors import EMBEDDING, OUTPUT, prepare_gguf
from hawqtool.pipeline.run.context import RunContext
from hawqtool.records import Rows
from hawqtool.runtime.reporter import Silent
from tests.support.gguf_template import write_template
from tests.support.tiny import tiny_llama

pytest.importorskip("gguf")


@pytest.mark.parametrize("tie", [False, True])
def test_scores_are_those_of_whole_models(tmp_path: Path, tie: bool) -> None:
    model = tiny_llama(tmp_path / "model", tie=tie)
    settings = {"model": str(model), "to": "gguf", "template": str(write_template(model, tmp_path / "t.gguf"))}
    gguf = prepare_gguf(load_config(None, settings | {"target_bpw": 6.0, "device": "cpu"}), Silent())
    rows = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(3))
    fitting, scoring = Rows(rows[:2], "a", "a"), Rows(rows[2:], "b", "b")
    ends = measure_ends(RunContext(gguf.job), gguf, fitting, scoring)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    expected = _log_probabilities(original, scoring.tokens)
    modules = {EMBEDDING: original.get_input_embeddings(), OUTPUT: original.get_output_embeddings()}
    assert set(ends.scores) == ({EMBEDDING} if tie else {EMBEDDING, OUTPUT})
    for tensor, found in ends.scores.items():
        weight = modules[tensor].weight.detach().clone()
        for kind in gguf.menu[tensor]:
            fields = ends.rounded(tensor, weight.float(), kind)
            _set_weight(modules[tensor], grid_values(fields.codes, block_grid(fields, kind), kind))
            log_q = _log_probabilities(original, scoring.tokens)
            reference = float((expected.exp() * (expected - log_q)).sum(-1).mean())
            assert found[kind.name].value == pytest.approx(reference, rel=1e-2, abs=2e-7)
        _set_weight(modules[tensor], weight)


def _set_weight(module: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        module.get_parameter("weight").copy_(values)


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)
