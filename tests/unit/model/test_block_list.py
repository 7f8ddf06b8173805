"""Blocks of models in wrappers, what a row of tokens does not use, and tensors that are tied by config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.data.generate import SampledModel, generate_rows
from hawqtool.errors import InputError, UsageError
from hawqtool.model.block_list import find_blocks
from hawqtool.model.carried.nested import all_nonzero
from hawqtool.model.discovery import discover
from hawqtool.model.skeleton import build_skeleton, max_positions
from hawqtool.model.tasks import TASKS, _refuse_other_inputs
from hawqtool.streaming.stream import ModelStream
from tests.support.tiny import VOCAB_SIZE, tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind

WRAPPERS = {"gemma3-images": "vision_tower", "qwen2-vl": "visual"}


class _Blocks(torch.nn.Module):
    main_input_name, config, dtype = "input_ids", None, torch.float32

    def __init__(self, part: torch.nn.Module, *functions: object) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(part)])
        self.functions = functions

    def is_custom_code(self) -> bool:
        return True  # no class of transformers

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = input_ids.float()
        for function in self.functions:
            hidden = hidden + function(hidden)  # type: ignore[operator]
        return self.layers[0](hidden)


def test_a_model_that_draws_numbers_is_refused() -> None:
    linear = torch.nn.Linear(8, 8)
    assert find_blocks(_Blocks(linear, torch.zeros_like))[0] == "layers"
    with pytest.raises(InputError, match=r"_Blocks draws random numbers \(rand_like\)"):
        find_blocks(_Blocks(linear, torch.rand_like))
    # A number per layer, which decides in training whether the layer is left out.
    assert find_blocks(_Blocks(linear, lambda x: x if torch.rand([]) is not None else x))[0] == "layers"
    with pytest.raises(InputError, match="_Blocks draws random numbers"):
        find_blocks(_Blocks(linear, lambda x: x if torch.rand([]) < 0.5 else -x))


def test_a_model_that_writes_into_its_weights_is_refused() -> None:
    model = _Blocks(torch.nn.Linear(8, 8), lambda hidden: model.layers[0][0].weight.div_(2) @ hidden[0])
    with pytest.raises(InputError, match="_Blocks writes into its weights"):
        find_blocks(model)


def test_blocks_without_a_linear_are_refused() -> None:
    with pytest.raises(InputError, match="its blocks hold no linear layer"):
        find_blocks(_Blocks(torch.nn.Conv1d(1, 1, 1)))


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_the_blocks_are_those_of_the_language_model(name: str, tmp_path: Path) -> None:
    model = build_skeleton(save_kind(kind_named(name), tmp_path), torch.float32)
    found, blocks = find_blocks(model)
    assert found == "model.language_model.layers" and blocks is model.get_submodule(found)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert max_positions(model) == 512


@pytest.mark.parametrize(("name", "tower"), sorted(WRAPPERS.items()))
def test_towers_are_ignored_and_never_loaded(name: str, tower: str, tmp_path: Path) -> None:
    folder = save_kind(kind_named(name), tmp_path)
    index = read_index(folder)
    structure = discover(build_skeleton(folder, torch.float32), index)
    parameters = {n for n, _ in build_skeleton(folder, torch.float32).named_parameters() if f"model.{tower}" in n}
    assert parameters and parameters <= structure.unused
    assert "model.language_model.embed_tokens.weight" not in structure.unused
    inside = (f"{tower}.blocks.0.attn.", f"{tower}.encoder.layers.0.self_attn.")
    weights = [n.removesuffix(".weight") for n in index.tensors if n.startswith(inside) and n.endswith(".weight")]
    assert weights and set(weights) <= set(structure.other_linears)
    assert {f"model.{name}" for name in weights} <= set(structure.other_linears)
    model = build_skeleton(folder, torch.float32)
    ModelStream(model, structure, TensorReader(index), torch.device("cpu"), torch.float32)
    loaded = [p for n, p in model.named_parameters() if n in parameters and not p.is_meta]
    assert model.device.type == "cpu" and all(p is next(model.parameters()) and not p.any() for p in loaded)
    assert not model.get_input_embeddings().weight.is_meta


def test_rows_are_sampled_from_the_model_inside(tmp_path: Path) -> None:
    folder = save_kind(kind_named("qwen2-vl"), tmp_path, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = SampledModel(folder, tokenizer, torch.device("cpu"), torch.float32, auto_class="AutoModelForMultimodalLM")
    rows = generate_rows(source, 2, 6, 0, lambda *_: None)
    assert rows.shape == (2, 6) and int(rows.max()) < VOCAB_SIZE


def test_a_head_that_is_stored_apart_is_another_tensor(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    index = read_index(folder)
    model = build_skeleton(folder, torch.float32, tensors=index.tensors)
    structure = discover(build_skeleton(folder, torch.float32, tensors=index.tensors), index)
    stream = ModelStream(model, structure, TensorReader(index), torch.device("cpu"), torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.arange(3, 19)[None]
    hidden = stream.final_hidden(rows, 1, lambda _: None)
    with torch.no_grad():
        assert torch.allclose(stream.outputs(rows, hidden), loaded(rows).logits, atol=1e-5)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    # Loaders would tie a head without a plain weight to the embedding.
    with pytest.raises(UsageError, match="ties the head to the input embedding"):
        discover(build_skeleton(folder, torch.float32, tensors=index.tensors), index, quantize_head=True)


def test_a_head_that_is_not_stored_stays_tied(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", tie=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model = build_skeleton(folder, torch.float32, tensors=tensors)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_draft_heads_are_ignored(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    draft = {n.replace("model.layers.0", "mtp.layers.0"): t.clone() for n, t in tensors.items() if ".layers.0." in n}
    save_file(tensors | draft, folder / "model.safetensors", {"format": "pt"})
    structure = discover(build_skeleton(folder, torch.float32), read_index(folder))
    assert "mtp.layers.0.self_attn.q_proj" in structure.other_linears
    assert not any(name.startswith("mtp") for name in structure.linears)


def test_models_that_read_no_text_alone_are_refused() -> None:
    class Captions:
        main_input_name = "pixel_values"

    task = next(task for task in TASKS if task.name == "multimodal language model")
    with pytest.raises(InputError, match="Captions needs pixel_values beside a text"):
        _refuse_other_inputs(Captions(), task)


def test_elements_without_a_value_count_as_nonzero_while_tracing() -> None:
    with all_nonzero():
        assert torch.zeros(3, device="meta").nonzero().shape == (3, 1)
    with pytest.raises(NotImplementedError):
        torch.zeros(3, device="meta").nonzero()
