"""Scales of the KV cache, from the command's configuration to the folder and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hawqtool.checkpoint.index import read_index
from hawqtool.cli.render import result_lines
from hawqtool.config import RunConfig
from hawqtool.errors import InputError, UsageError
from hawqtool.export.verify import verify_folder
from hawqtool.formats.cache import CachedAttention
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.pipeline.inspection.packed import describe_packed
from hawqtool.pipeline.load_trial import child
from hawqtool.pipeline.load_trial.trial import _difference, _own_outputs
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.page.html import page
from hawqtool.runtime.reporter import Silent
from hawqtool.streaming.rounded_cache import CacheRounding
from tests.support.runs import Run, read, settings
from tests.support.tiny_zoo import kind_named, save_kind


def test_scales_are_stored_and_evaluated(place: Path, run: Run) -> None:
    folder, report = run(bits="8", kv_cache="fp8-head")
    assert verify_folder(folder, place / "model").problems == ()
    config = read(folder / "config.json")["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    stored = load_file(folder / "model.safetensors")
    scales = {name: tensor for name, tensor in stored.items() if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4 and {tensor.shape for tensor in scales.values()} == {torch.Size([2, 1, 1])}
    cache = report["kv_cache"]
    assert (cache["bytes_per_token"], cache["bytes_per_token_16_bit"]) == (128, 256)
    assert 0 < cache["kl"] < 0.01
    said = "fp8-head, 128 bytes a token instead of 256; by itself it costs the original KL"
    assert any(line.startswith(f"KV cache    {said}") for line in result_lines(report))
    assert f"KV cache: {said}" in (folder / "README.md").read_text()
    assert f"KV cache: {said}" in page(report, {}, {}, {})
    assert describe_packed(read_index(folder), config)["kv_cache"] == "fp8-head"
    # The evaluation computes with it: with scales that cut everything it is another one.
    data = settings(place, eval_data=place / "other.txt")
    evaluated = run_evaluate(data, folder, Silent())["quantized"]
    for name in scales:
        stored[name] *= 1e-6
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    cut = run_evaluate(data, folder, Silent())["quantized"]
    assert cut["kl"] > 10 * evaluated["kl"]
    assert any("differs from its SHA-256" in problem for problem in verify_folder(folder).problems)


def test_transformers_rounds_what_is_cached_as_we_do(place: Path, run: Run, tmp_path: Path) -> None:
    folder, _ = run(bits="8", kv_cache="fp8", rounding="rtn", eval=False, eval_samples=None)
    job = prepare(settings(place, bits="8", eval=False, eval_samples=None), Silent())
    row = torch.randint(3, 128, (1, 32), generator=torch.Generator().manual_seed(0))
    save_file({"rows": row}, tmp_path / child.ROWS)
    child.main(str(folder), "LlamaForCausalLM", "0", str(tmp_path), "null", "", "cpu")
    theirs, ours = load_file(tmp_path / child.OUTPUTS)["outputs"], _own_outputs(job, folder, row)
    assert _difference(ours, theirs) < 1e-5
    stream = job.packed_stream(folder)
    stream.cache = CacheRounding()
    unrounded = stream.outputs(row, stream.final_hidden(row, 1, lambda _: None)).float()
    assert _difference(unrounded, theirs) > 1e-3


def test_scales_have_the_dtype_of_the_model(run: Run, tmp_path: Path) -> None:
    """Of models whose parts transformers names otherwise it keeps that of the file, and computes keys in it."""
    kind = kind_named("qwen2-vl")
    model = save_kind(kind, tmp_path / "model")
    folder, _ = run(model=str(model), bits="8", kv_cache="fp8", rounding="rtn", eval=False, eval_samples=None)
    stored = load_file(folder / "model.safetensors")
    assert {stored[name].dtype for name in stored if name.endswith(("k_scale", "v_scale"))} == {torch.bfloat16}
    loaded = kind.auto_class.from_pretrained(folder, dtype="auto")
    assert bool(loaded(torch.arange(3, 35)[None]).logits.isfinite().all())
    attention = CachedAttention("a", "a", heads=2, head_width=8)
    found = [attention.with_scales_of(weights).parts("fp8")[0].dtype for weights in ("F32", "BF16", "F16", "")]
    assert found == ["F32", "BF16", "F32", "F32"]


def test_models_without_keys_and_values_are_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    model = save_kind(kind_named("gpt2"), tmp_path / "model")
    with pytest.raises(UsageError, match="no attention of GPT2LMHeadModel has layers k_proj and v_proj"):
        run(model=str(model), bits="8", kv_cache="fp8", profile="vllm")
    model = save_kind(kind_named("opt-pre"), tmp_path / "opt")
    with pytest.raises(InputError, match="reads num_key_value_heads, which OPTConfig lacks .*; --profile vllm"):
        run(model=str(model), bits="8", kv_cache="fp8")
    with pytest.raises(ValueError, match="kv-cache has no effect on GGUF files"):
        RunConfig(model=str(model), to="gguf", template="x.gguf", target_bpw=4, kv_cache="fp8")
