"""What discovery finds in supported models, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, GPT2Config, MambaConfig, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from hawqtool.checkpoint.index import read_index
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.discovery import Structure, discover
from hawqtool.model.skeleton import build_skeleton
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import CONFIGS, tiny_llama, tiny_model, tiny_tokenizer

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
UNITS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def structure_of(folder: Path) -> Structure:
    return discover(build_skeleton(folder, torch.float32), read_index(folder))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("tie", [False, True])
def test_groups_units_and_other_linears(kind: str, tie: bool, tmp_path: Path) -> None:
    structure = structure_of(tiny_model(kind, tmp_path / "m", layers=3, tie=tie))
    assert [block.index for block in structure.blocks] == [0, 1, 2]
    for block in structure.blocks:
        assert block.name == f"model.layers.{block.index}"
        found = tuple(tuple(m.name.removeprefix(f"{block.name}.") for m in group) for group in block.input_groups)
        assert found == GROUPS
    expected = [f"model.layers.{index}.{unit}" for index in range(3) for unit in UNITS]
    assert [unit.name for unit in structure.units] == expected
    assert structure.other_linears == ("lm_head",)


def test_each_linear_is_a_unit_where_nothing_fuses_them(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    structure = discover(build_skeleton(folder, torch.float32), read_index(folder), fuses=False)
    assert [unit.name for unit in structure.units] == list(structure.linears)
    # What shares an input still does.
    assert [len(group) for group in structure.blocks[0].input_groups] == [3, 1, 2, 1]


@pytest.mark.parametrize(("dtype", "scale_bytes"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_specs_carry_shapes_blocks_and_scale_bytes(dtype: torch.dtype, scale_bytes: int, tmp_path: Path) -> None:
    linears = structure_of(tiny_llama(tmp_path / "m", dtype=dtype)).linears
    assert len(linears) == 14
    key = linears["model.layers.1.self_attn.k_proj"]
    assert (key.out_features, key.in_features, key.block, key.scale_bytes) == (32, 64, 1, scale_bytes)
    assert key.unit == "model.layers.1.self_attn.qkv_proj"
    down = linears["model.layers.0.mlp.down_proj"]
    assert (down.out_features, down.in_features) == (64, 128)


def test_discovery_needs_no_weights_and_leaves_no_hooks(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    model = build_skeleton(folder, torch.float32)
    discover(model, read_index(folder))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def refusal(folder: Path, output: Path) -> str:
    """Message of the refusal of a run, after checking that it wrote nothing."""
    config = RunConfig(model=str(folder), output=str(output), target_bpw=4.5, group_size=32, device="cpu")
    before = sorted(output.parent.iterdir())
    with pytest.raises(InputError) as caught:
        run_quantize(config, "test", Silent(), lambda _: None)
    assert caught.value.exit_code == 4
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


def saved(config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_transformers_cannot_load_packed_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    message = refusal(saved(config, tmp_path / "m"), tmp_path / "out")
    assert "transformers cannot load this model when it is packed" in message
    assert "--profile vllm" in message


def kept_of(folder: Path) -> dict[str, str]:
    """Reason of every kept matrix by its stored name."""
    return {tensor.name: tensor.reason for tensor in structure_of(folder).kept}


def test_embedding_and_head_of_a_plain_decoder_are_all_that_is_kept(tmp_path: Path) -> None:
    found = kept_of(tiny_llama(tmp_path / "m"))
    assert found == {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}


def test_parts_of_a_state_space_block_are_kept_with_reasons(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
    structure = structure_of(saved(config, tmp_path / "m"))
    found = {t.pattern.removeprefix("backbone.layers.*.mixer."): t.reason for t in structure.kept if t.block == 1}
    assert found == {
        "A_log": "state-space parameter",
        "conv1d.weight": "convolution",
        "dt_proj.weight": "weight used outside its layer",
    }
    assert set(structure.other_linears) == {f"backbone.layers.{n}.mixer.dt_proj" for n in (0, 1)} | {"lm_head"}
    leaves = {name.rpartition(".")[2] for name in structure.linears}
    assert leaves == {"in_proj", "x_proj", "out_proj"}


def test_a_linear_called_twice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: LlamaMLP, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + self.up_proj(x))

    folder = tiny_llama(tmp_path / "m")
    monkeypatch.setattr(LlamaMLP, "forward", twice)
    found = kept_of(folder)
    assert found["model.layers.0.mlp.up_proj.weight"] == "called more than once"
    # Engines fuse the two and need one format for both.
    assert found["model.layers.0.mlp.gate_proj.weight"] == "fused with what is kept"
    assert "model.layers.0.mlp.down_proj.weight" not in found


def test_blocks_that_are_run_again_are_refused(tmp_path: Path) -> None:
    """A walk would run them once: ALBERT has one block for all its layers, others go through their list in rounds."""
    settings: dict[str, Any] = {"vocab_size": 64, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 64}
    config = AlbertConfig(**settings, num_hidden_layers=3, num_attention_heads=4)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "albert")
    with pytest.raises(
        InputError, match="from albert.encoder.albert_layer_groups.0 on, are called 3 times, expected 1"
    ):
        structure_of(tmp_path / "albert")


def test_a_weight_used_past_its_module_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def around(self: LlamaMLP, x: Tensor) -> Tensor:
        gate = nn.functional.linear(x, self.gate_proj.weight) + self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    folder = tiny_llama(tmp_path / "m")
    monkeypatch.setattr(LlamaMLP, "forward", around)
    assert kept_of(folder)["model.layers.0.mlp.gate_proj.weight"] == "weight used outside its layer"


def test_a_linear_never_called_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path / "m")
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    assert kept_of(folder)["model.layers.0.mlp.up_proj.weight"] == "not called by these inputs"


def test_a_linear_with_a_forward_of_its_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    def build(self: LlamaMLP, config: PretrainedConfig) -> None:
        before(self, config)
        self.down_proj = Doubled(config.intermediate_size, config.hidden_size, bias=False)

    folder, before = tiny_llama(tmp_path / "m"), LlamaMLP.__init__
    monkeypatch.setattr(LlamaMLP, "__init__", build)
    found = kept_of(folder)
    assert {n: r for n, r in found.items() if "layers" in n} == {
        f"model.layers.{n}.mlp.down_proj.weight": "own forward" for n in (0, 1)
    }


def test_a_second_output_of_all_rows_that_the_next_block_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_outputs(self: LlamaDecoderLayer, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        return forward(self, hidden_states, *args, **kwargs), hidden_states.mean()

    def through(self: LlamaModel, input_ids: Tensor, **_: object) -> BaseModelOutputWithPast:
        hidden, shift = self.embed_tokens(input_ids), torch.zeros(())
        table = self.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden, second = layer(hidden, position_embeddings=table, shift=shift)
            shift = second if reads else shift
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    folder, forward, reads = tiny_llama(tmp_path / "m"), LlamaDecoderLayer.forward, False
    monkeypatch.setattr(LlamaDecoderLayer, "forward", two_outputs)
    monkeypatch.setattr(LlamaModel, "forward", through)
    assert structure_of(folder).extra_outputs == (True,)
    reads = True
    with pytest.raises(InputError, match="model.layers.0 hands on a value of shape .. that is no row's own"):
        structure_of(folder)
