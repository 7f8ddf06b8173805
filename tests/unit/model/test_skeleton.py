"""Which class is built from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hawqtool.model.skeleton import SENTENCE_ENCODER, build_skeleton
from hawqtool.model.tasks import model_task
from tests.support.tiny_zoo import kind_named, save_kind


def test_a_sentence_encoder_that_names_its_masked_language_model_has_no_head(tmp_path: Path) -> None:
    save_kind(kind_named("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(build_skeleton(tmp_path, torch.float32)).__name__ == "BertForMaskedLM"
    (tmp_path / SENTENCE_ENCODER).write_text("[]")
    model = build_skeleton(tmp_path, torch.float32)
    assert type(model).__name__ == "BertModel" and model_task(model).name == "embedding model"
