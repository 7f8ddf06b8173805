"""Linears that a model's own initialization reads are found one by one; what it computes is in place."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel, PretrainedConfig, PreTrainedModel

from hawqtool.checkpoint.index import read_index
from hawqtool.model.loading.initialization import initialized_linears
from hawqtool.model.skeleton import build_skeleton


class _Config(PretrainedConfig):
    model_type = "reads-some"
    initializer_range = 0.02


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o, self.down = (nn.Linear(4, 4) for _ in range(3))


class _Model(PreTrainedModel):
    config_class = _Config
    __module__ = "transformers.models.reads_some"  # of code elsewhere, modules without parameters are passed over

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_Layer() for _ in range(3))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _Layer):
            nn.init.zeros_(module.down.weight)
            nn.init.zeros_(module.o.weight)


def test_only_what_the_code_reads_is_named_in_every_layer() -> None:
    model = _Model(_Config())
    names = [f"layers.{n}.{kind}" for n in range(3) for kind in ("q", "o", "down")]
    assert initialized_linears(model, names) == {name for name in names if not name.endswith("q")}
    assert initialized_linears(model, [name for name in names if name.endswith("q")]) == frozenset()


def test_the_model_keeps_its_weights() -> None:
    model = _Model(_Config())
    before = model.state_dict()
    initialized_linears(model, ["layers.0.o"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_code_of_a_checkpoint_is_not_called() -> None:
    assert initialized_linears(nn.Linear(2, 2), [""]) == frozenset()


def test_tables_that_no_checkpoint_holds_are_computed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=20,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    original = MarianMTModel(config)
    original.save_pretrained(tmp_path)
    tensors = read_index(tmp_path).tensors
    assert not any("embed_positions" in name for name in tensors)
    skeleton = build_skeleton(tmp_path, torch.float32, tensors=tensors)
    for side in ("encoder", "decoder"):
        name = f"model.{side}.embed_positions.weight"
        assert torch.equal(skeleton.get_buffer(name), original.get_parameter(name))
    # What is drawn at random is no table: without it a checkpoint is not whole.
    skeleton = build_skeleton(tmp_path, torch.float32, tensors=set(tensors) - {"model.shared.weight"})
    assert "model.shared.weight" in dict(skeleton.named_parameters())
