"""How many experts a token goes through, and the share of weights that it reads."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from hawqtool.model.experts import active_share, experts_per_token


class Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__ |= values

    def get_text_config(self) -> Config:
        return self


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MixtralConfig(num_experts_per_tok=2), 2),
        (Qwen3MoeConfig(num_experts_per_tok=8), 8),
        (LlamaConfig(), None),
        (Config(moe_topk=[1, 4, 4]), 4),
        (Config(num_experts_per_token=6, n_experts=64), 6),
    ],
)
def test_the_configuration_says_how_many(config: Any, expected: int | None) -> None:
    assert experts_per_token(config) == expected


def test_shares_of_experts_and_of_what_every_token_reads() -> None:
    experts = [f"layers.0.mlp.experts.{n}.up_proj" for n in range(8)]
    assert active_share(experts, [10] * 8, 2) == 0.25
    assert active_share(["layers.0.self_attn.o_proj"], [10], 2) == 1.0
    assert active_share([*experts, "layers.0.mlp.shared.up_proj"], [10] * 8 + [80], 2) == pytest.approx(0.625)
    assert active_share(experts[:1], [10], 2) == 1.0, "a token cannot read more than there is"
