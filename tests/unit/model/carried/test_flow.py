"""What blocks read of each other is found by running rows of zeros; what cannot be seen is refused, not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from hawqtool.errors import InputError
from hawqtool.model.carried.flow import DataFlow, trace_flow
from hawqtool.model.skeleton import build_skeleton
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind


def flow_of(name: str, folder: Path) -> DataFlow:
    return trace_flow(build_skeleton(save_kind(kind_named(name), folder), torch.float32))[0]


def test_an_encoders_states_live_as_long_as_the_decoder(tmp_path: Path) -> None:
    flow = flow_of("t5", tmp_path)
    assert flow.names == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert [flow.alive(behind) for behind in range(-1, 4)] == [
        ((-1, 0),),
        ((0, 0),),
        ((1, 0),),
        ((2, 0), (1, 0)),
        ((3, 0),),
    ]
    # Position biases are the same for all rows: they are no states. Encoder states pass a norm: computed again.
    assert {leaf[0] for leaf in flow.constants} == {0, 2}
    assert flow.recorded == (True, True, False, False)


def test_an_empty_cache_that_a_model_makes_is_none_to_its_blocks(tmp_path: Path) -> None:
    settings = {"vocab_size": 128, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    config = transformers.FlaubertConfig(**settings)
    transformers.FlaubertWithLMHeadModel(config).save_pretrained(tmp_path)
    flow = trace_flow(build_skeleton(tmp_path, torch.float32))[0]
    assert flow.names == (
        "transformer.attentions.0",
        "transformer.ffns.0",
        "transformer.attentions.1",
        "transformer.ffns.1",
    )


def test_shared_keys_and_values_are_dropped_behind_their_last_reader(tmp_path: Path) -> None:
    flow = flow_of("gemma4-shared", tmp_path)
    assert [len(flow.alive(behind)) for behind in range(-1, 4)] == [1, 3, 5, 5, 1]
    assert {flow.places[leaf] for leaf in flow.alive(2) if leaf[0] < 2} == {(0, 2)}


def test_streams_come_before_rows(tmp_path: Path) -> None:
    flow = flow_of("gemma3n", tmp_path)
    assert flow.alive(0)[0] == (0, 0) and flow.places[0, 0] == (1, 2)


@pytest.mark.parametrize("seen", [True, False])
def test_a_read_that_cannot_be_seen_is_refused(seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def through(self: LlamaModel, input_ids: Tensor, **_: object) -> BaseModelOutputWithPast:
        hidden = first = self.embed_tokens(input_ids)
        table = self.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden + (first if seen else first.detach()), position_embeddings=table)
            first = hidden if first is hidden else first
            first = hidden if layer is self.layers[0] else first
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(LlamaModel, "forward", through)
    model = build_skeleton(tiny_llama(tmp_path, layers=3), torch.float32)
    if seen:
        flow, _ = trace_flow(model)
        assert flow.alive(1) == ((1, 0), (0, 0)) and flow.recorded == (True, False, False)
    else:
        with pytest.raises(InputError, match="model.layers.2 depends on an output of an earlier block"):
            trace_flow(model)
