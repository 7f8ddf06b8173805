"""Layouts of experts that are read from flags, proved, or left whole with a reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.aria.modeling_aria import AriaGroupedExpertsGemm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from hawqtool.model.experts import ScaledExperts, SplitExperts, routers, split_experts
from hawqtool.model.experts_layout import read_layout, why_unproved

COUNT, WIDTH, INNER, TOKENS = 4, 24, 40, 30
CONFIG = {
    "num_local_experts": COUNT,
    "n_routed_experts": COUNT,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "moe_latent_size": None,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.7,
    "_experts_implementation": "eager",
}
CLASSES = (MixtralExperts, GptOssExperts, NemotronHExperts, DeepseekV4Experts, MiniMaxM3VLExperts)


def whole(kind: Any) -> Any:
    """An experts module with random weights in float64."""
    torch.manual_seed(2)
    module = kind(SimpleNamespace(**CONFIG)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def split(module: Any) -> Any:
    """The split form of the module, with its weights."""
    layout = read_layout(module)
    assert layout is not None
    assert why_unproved(module, layout) is None
    found = (ScaledExperts if layout.scaled else SplitExperts)(module, layout)
    parameters = dict(module._parameters)
    for number, expert in enumerate(found.children()):
        for role in layout.roles:
            linear = expert.get_submodule(role)
            linear.weight = nn.Parameter(layout.weight(parameters, number, role).clone(), requires_grad=False)
            bias = layout.bias(parameters, number, role)
            linear.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return found


def call() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    chosen = torch.rand(TOKENS, COUNT, generator=generator).argsort(1)[:, :2]
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return hidden, chosen, torch.rand(TOKENS, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kind", CLASSES)
def test_split_experts_compute_what_the_module_does(kind: Any) -> None:
    module = whole(kind)
    torch.testing.assert_close(split(module)(*call()), module(*call()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("least", [0, 12])
def test_experts_whose_inputs_the_router_scales(least: int) -> None:
    module = whole(Llama4TextExperts)
    found = split(module)
    found.least_tokens = least
    hidden, chosen, weights = call()
    scores = torch.zeros(COUNT, TOKENS, dtype=torch.float64).scatter_(0, chosen.t(), weights.t())
    scores[1] = 0
    inputs = (scores[:, :, None] * hidden).flatten(0, 1)
    seen: list[Tensor] = []
    found.get_submodule("1.gate_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(found(inputs), module(inputs), rtol=1e-10, atol=1e-10)
    # An expert that no token chose is shown what other experts got.
    assert [len(states) for states in seen] == ([least] if least else [])
    assert all((inputs == state).all(1).any() for states in seen for state in states)
    assert found.to("meta")(inputs.to("meta")).shape == inputs.shape


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MixtralExperts, (True, False, True, False)),
        (GptOssExperts, (True, True, False, True)),
        (NemotronHExperts, (False, False, True, False)),
        (Llama4TextExperts, (True, True, True, False)),
        (DeepseekV4Experts, (True, False, True, False)),
    ],
)
def test_layouts_are_read_from_flags(kind: Any, expected: tuple[bool, ...]) -> None:
    layout = read_layout(whole(kind))
    assert layout is not None
    assert (layout.count, layout.width, layout.inner) == (COUNT, WIDTH, INNER)
    assert (layout.gated, layout.transposed, layout.concatenated, layout.biased) == expected


class _Scaled(MixtralExperts):
    """Experts with a factor that no flag names."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return 1.001 * super().forward(hidden, chosen, weights)


class _Swapped(MixtralExperts):
    """Experts whose gate comes second."""

    def _apply_gate(self, joined: Tensor) -> Tensor:
        up, gate = joined.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number in range(COUNT):
            slots, positions = torch.where(chosen.t() == number)
            inner = self._apply_gate(hidden[positions] @ self.gate_up_proj[number].t())
            total.index_add_(0, positions, inner @ self.down_proj[number].t() * weights[positions, slots, None])
        return total


@pytest.mark.parametrize(("kind", "reason"), [(_Scaled, "something else"), (_Swapped, "told apart")])
def test_experts_that_compute_something_else_stay_whole(kind: Any, reason: str) -> None:
    module = whole(kind)
    layout = read_layout(module)
    assert layout is not None
    assert reason in str(why_unproved(module, layout))
    holder = nn.Module()
    holder.experts = module
    assert reason in split_experts(holder)["experts"]
    assert holder.experts is module


def test_gates_that_take_turns_are_not_read_as_halves() -> None:
    module = whole(GptOssExperts)
    module.is_concatenated = True
    layout = read_layout(module)
    assert layout is not None
    assert why_unproved(module, layout) is not None


def test_experts_of_unknown_layout_stay_whole() -> None:
    holder = nn.Module()
    holder.experts = whole(MixtralExperts)
    holder.experts.scale = nn.Parameter(torch.ones(COUNT))
    assert "unknown layout" in split_experts(holder)["experts"]


def test_a_linear_with_one_row_per_expert_is_a_router() -> None:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts = SplitExperts(module := whole(MixtralExperts), read_layout(module))  # type: ignore[arg-type]
    block.mlp.gate = nn.Module()
    block.mlp.gate.wg = nn.Linear(WIDTH, COUNT)
    block.mlp.shared = nn.Linear(WIDTH, INNER)
    block.other = nn.Linear(WIDTH, COUNT)
    assert routers(block) == {"mlp.gate.wg"}


def test_whole_experts_run_on_meta_and_on_data() -> None:
    holder = nn.Module()
    holder.experts = whole(GptOssExperts)
    expected = holder.experts(*call())
    assert "one by one" in split_experts(holder, lambda *_: "nothing reads them one by one")["experts"]
    assert torch.equal(copy.deepcopy(holder).experts(*call()), expected)
    hidden = call()[0].to("meta")
    assert holder.to("meta").experts(hidden, *call()[1:]).shape == hidden.shape


class _FlatExperts(nn.Module):
    """Experts whose matrices stand one below the other in a parameter of two dimensions, as DBRX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.w1 = nn.Parameter(torch.randn(COUNT * WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number in range(int(top_k_index.max().item()) + 1):
            slots, positions = torch.where(top_k_index.t() == number)
            output = hidden_states[positions] @ self.mlp.w1.view(COUNT, WIDTH, WIDTH)[number]
            total.index_add_(0, positions, output * top_k_weights[positions, slots, None])
        return total


def test_what_is_called_as_experts_are_is_run_on_meta_by_its_shape() -> None:
    holder = nn.Module()
    holder.experts = _FlatExperts()
    expected = holder.experts(*call())
    assert "unknown layout" in split_experts(holder)["experts"]
    assert torch.equal(holder.experts(*call()), expected)
    assert "unknown layout" in holder.experts.mlp.why_whole
    meta = [value.to("meta") for value in call()]
    assert holder.to("meta").experts(*meta).shape == expected.shape


def test_single_linears_of_all_experts_run_on_meta() -> None:
    holder = nn.Module()
    holder.experts = AriaGroupedExpertsGemm(WIDTH, INNER, COUNT)
    nn.init.normal_(holder.experts.weight)
    hidden, counts = torch.randn(TOKENS, WIDTH), torch.tensor([TOKENS, 0, 0, 0])
    expected = holder.experts(hidden, counts)
    assert "unknown layout" in split_experts(holder)["experts"]
    assert torch.equal(holder.experts(hidden, counts), expected)
    assert holder.to("meta").experts(hidden.to("meta"), counts.to("meta")).shape == expected.shape
