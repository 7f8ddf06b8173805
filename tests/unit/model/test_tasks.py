"""What kind of model a checkpoint is, and the kinds that would be judged by a figure that means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.evaluation.divergence import interpolate_log
from hawqtool.model.inputs.arguments import model_inputs
from hawqtool.model.skeleton import build_skeleton, max_positions, token_embedding
from hawqtool.model.tasks import class_task, model_task, row_labels, row_outputs
from hawqtool.pipeline.dry_run import describe
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.job import prepare
from hawqtool.runtime.reporter import Silent
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.tiny_zoo import _BERT, _GROUPED, kind_named, save_kind

_SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}


def save(folder: Path, config: str, model: str, **settings: object) -> Path:
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    built.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_reads_images_or_hashes_has_no_embedding_of_tokens() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    with torch.device("meta"):
        assert token_embedding(transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes))) == (9, 8)
        assert token_embedding(transformers.ViTModel(transformers.ViTConfig(**sizes))) is None
        assert token_embedding(transformers.CanineModel(transformers.CanineConfig(**sizes))) is None


def test_rows_of_a_classifier_with_encoder_and_decoder_end_once_where_it_is_read(tmp_path: Path) -> None:
    sizes = {"vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{part}_{size}": 32 for part in ("encoder", "decoder") for size in ("ffn_dim",)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    place = save(tmp_path / "m", "BartConfig", "BartForSequenceClassification", **sizes, **heads)
    model = transformers.BartForSequenceClassification.from_pretrained(place, dtype=torch.float32).eval()
    end, padding = model.config.eos_token_id, model.config.pad_token_id
    rows = torch.tensor([[0, 7, end, 8, 9], [0, 11, 12, end, end]])
    inputs = model_inputs(model, rows)
    assert inputs["input_ids"].tolist() == [[0, 7, padding, 8, end], [0, 11, 12, padding, end]]
    assert inputs["decoder_input_ids"][:, 0].tolist() == [end, end]  # BART's decoder begins with it
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 3)
    job = prepare(RunConfig(model=str(place), group_size=32))
    assert [spec.name for spec in job.structure.blocks] == ["model.encoder.layers.0", "model.decoder.layers.0"]


def test_a_class_for_both_is_a_masked_language_model_unless_it_is_a_decoder(tmp_path: Path) -> None:
    settings = {"vocab_size": 128, "emb_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    place = save(tmp_path / "m", "XLMConfig", "XLMWithLMHeadModel", **settings)
    assert model_task(build_skeleton(place, torch.float32)).name == "masked language model"


def drop_architectures(folder: Path) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", "causal language model"),
        ("BertForMaskedLM", "masked language model"),
        ("LlamaForSequenceClassification", "sequence classifier"),
        ("ViTForImageClassification", "image classifier"),
        ("LlamaModel", "embedding model"),
    ],
)
def test_tasks_by_class(name: str, task: str) -> None:
    found = class_task(name)
    assert found is not None
    assert found.name == task
    assert class_task("NoSuchModel") is None


def test_a_causal_model_without_architectures_is_one(tmp_path: Path) -> None:
    model = build_skeleton(drop_architectures(tiny_llama(tmp_path)), torch.float32)
    assert model_task(model).name == "causal language model"


def test_an_encoder_without_architectures_is_no_causal_model(tmp_path: Path) -> None:
    folder = drop_architectures(save_kind(kind_named("bert-masked"), tmp_path))
    with pytest.raises(InputError, match="sees later tokens.*such as BertForMaskedLM"):
        build_skeleton(folder, torch.float32)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_quantities_are_no_probabilities(tmp_path: Path, num_labels: int) -> None:
    settings: dict[str, object] = _BERT | {"num_labels": num_labels, "problem_type": "regression"}
    folder = save(tmp_path, "BertConfig", "BertForSequenceClassification", **settings)
    with pytest.raises(InputError, match="gives no probabilities"):
        build_skeleton(folder, torch.float32)


@pytest.mark.parametrize("problem", [{"num_labels": 1}, _SEVERAL])
def test_labels_that_do_not_exclude_each_other_are_judged_one_by_one(
    tmp_path: Path, problem: dict[str, object]
) -> None:
    settings: dict[str, object] = _BERT | problem
    model = build_skeleton(save(tmp_path, "BertConfig", "BertForSequenceClassification", **settings), torch.float32)
    labels = model.config.num_labels
    scores = torch.randn(5, labels, generator=torch.Generator().manual_seed(1))
    found = row_outputs(model, SimpleNamespace(logits=scores))
    assert found.shape == (5, labels, 2) and row_labels(model) == labels
    torch.testing.assert_close(found.softmax(-1)[..., 1], scores.sigmoid())


@pytest.mark.parametrize(("name", "positions"), [("roberta", 510), ("bert", 512), ("gpt2", 512), ("vit", None)])
def test_positions(tmp_path: Path, name: str, positions: int | None) -> None:
    assert max_positions(build_skeleton(save_kind(kind_named(name), tmp_path), torch.float32)) == positions


@pytest.mark.parametrize("name", ["bert", "bert-masked", "vit"])
def test_rows_cannot_be_sampled_from_other_models(tmp_path: Path, name: str) -> None:
    source = save_kind(kind_named(name), tmp_path)
    job = prepare(RunConfig(model=str(source), group_size=32, target_bpw=5, device="cpu"))
    with pytest.raises(UsageError, match="rows cannot be sampled from this"):
        describe(job)


@pytest.mark.parametrize("points", [[(10, 0.0), (20, 0.1)], [(10, -1e-9), (20, 1e-9)]])
def test_a_divergence_that_is_not_positive_cannot_be_interpolated(points: list[tuple[int, float]]) -> None:
    assert interpolate_log(points, 15) is None
    assert interpolate_log(points, 20) == points[1][1]


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        ("BertConfig", "BertForSequenceClassification", _BERT | {"num_labels": 3}),
        ("LlamaConfig", "LlamaForSequenceClassification", _GROUPED | {"num_labels": 3}),
        ("BertConfig", "BertForSequenceClassification", _BERT | {"num_labels": 1}),
        ("BertConfig", "BertForSequenceClassification", _BERT | _SEVERAL),
        ("LlamaConfig", "LlamaModel", _GROUPED),
        ("GPT2Config", "GPT2LMHeadModel", None),
    ],
)
def test_quantize_and_evaluate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    model: str,
    settings: dict[str, object] | None,
) -> None:
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)  # drawing takes longer
    source = tmp_path / "model"
    if settings is None:  # transformers does not load it packed: evaluating it must not need a profile
        save_kind(kind_named("gpt2"), source)
    else:
        save(source, config, model, **settings)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(random_text(1, 8000))
    other.write_text(random_text(2, 2000))
    common = {"model": str(source), "seq_len": 32, "eval_samples": 4, "group_size": 32, "device": "cpu"}
    run = RunConfig(
        **common, output=str(tmp_path / "out"), calibration=str(text), num_samples=8, target_bpw=5, profile="vllm"
    )
    report = run_quantize(run, "hawqtool quantize", Silent(), lambda _: None)
    measure = "embedding_error" if model == "LlamaModel" else "kl"
    original, mixed = report["evaluation"]["original"], report["evaluation"]["mixed"]
    assert report["evaluation"]["measure"] == measure
    assert mixed[measure] > original[measure]
    assert ("perplexity" in original) == (model == "GPT2LMHeadModel")
    assert ("cosine" in original) == (model == "LlamaModel")
    found = run_evaluate(RunConfig(**common, eval_data=str(other)), tmp_path / "out", Silent())
    assert found["quantized"][measure] > 0
