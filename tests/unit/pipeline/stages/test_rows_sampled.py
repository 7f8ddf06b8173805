"""Rows that the model writes: which share they are, in what texts they are sampled, and that a GPU begins ahead."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hawqtool.config import RunConfig
from hawqtool.data.generate import SampledModel, batch_rows
from hawqtool.errors import SamplingError, UsageError
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.resolved import resolve_settings
from hawqtool.pipeline.stages import rows as stage
from hawqtool.pipeline.stages import sampled_rows as sampling
from hawqtool.pipeline.stages.measure import measuring_rows
from hawqtool.pipeline.stages.refine import is_held_out as is_held_out_of_learning
from hawqtool.pipeline.stages.report import public_config
from hawqtool.rounding.factor import SCARCE_TOKENS_PER_COLUMN
from hawqtool.rounding.statistics import is_held_out
from hawqtool.runtime.background import BegunWork
from hawqtool.runtime.ranks import ALONE, Ranks
from hawqtool.runtime.reporter import Silent
from hawqtool.settings.fields import SELF
from tests.support.crew import by_crew
from tests.support.runs import random_text
from tests.support.tiny import tiny_llama


@pytest.mark.parametrize(
    ("device", "calibration", "share", "sampled"),
    [
        ("cuda", "text.txt", 0.0, (8, 128)),
        ("cpu", "text.txt", 0.0, (4, 256)),
        ("cuda", "text.txt", 0.5, (16, 128)),
        ("cuda", SELF, 0.5, (16, 128)),
        ("cpu", SELF, 0.0, (4, 512)),
    ],
)
def test_rows_are_of_short_texts_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, calibration: str, share: float, sampled: tuple[int, int]
) -> None:
    def generate(_model: Any, count: int, length: int, _seed: int, _progress: Any, load: Any) -> torch.Tensor:
        assert (count, length) == sampled and load() == "loaded"
        ahead.append(threading.current_thread() is not threading.main_thread())
        return torch.arange(count)[:, None].expand(count, length)

    ahead = list[bool]()
    monkeypatch.setattr(sampling, "generate_rows", generate)
    monkeypatch.setattr(sampling, "sampled_model", lambda _: None)
    monkeypatch.setattr(sampling, "can_sample", lambda _: True)
    monkeypatch.setattr(stage, "_of_long_rows", lambda _, quota: quota)
    config = RunConfig(model="m", calibration=calibration)
    settings, place = SimpleNamespace(seq_len=512, sampled_share=share), torch.device(device)
    job: Any = SimpleNamespace(config=config, settings=settings, device=place, ranks=ALONE, ahead=BegunWork())
    monkeypatch.setattr(stage, "_shares", lambda *_: {SELF: {"selection": 4}})
    monkeypatch.setattr(stage, "_counts", lambda _: {})
    monkeypatch.setattr(sampling, "load_sampled", lambda _: "loaded")
    job.index, job.stream = SimpleNamespace(rotation=None), lambda: "with ends"
    job.structure = SimpleNamespace(head="quantized, so that streams share nothing")
    stage.load_ahead(job, resuming=True)
    assert job.ahead.result(stage._ENDS, lambda: "none") == "none"
    job.structure = SimpleNamespace(head=None)
    stage.load_ahead(job, resuming=False)
    assert job.ahead.result(stage._ENDS, lambda: "none") == ("with ends" if device == "cuda" else "none")
    assert stage.sampled_tokens(job) == sampled[0] * sampled[1]
    texts, quota = stage._asked_of_model(job, {"selection": 4})
    found = sampling.sampled_rows(RunContext(job), texts)
    assert ahead == [device == "cuda"] and quota == {"selection": 4}
    assert found.shape == (4, sampled[0] // 4 * sampled[1])
    assert found[1].unique().tolist() == list(range(sampled[0] // 4, sampled[0] // 2))


def _job(tmp_path: Path, **given: Any) -> Job:
    text = tmp_path / "text.txt"
    text.write_text(random_text(0, 8000))
    config: dict[str, Any] = {
        "model": str(tiny_llama(tmp_path / "model")), "device": "cpu", "bits": "3", "target_bpw": 3.5,
        "group_size": 32, "calibration": (str(text),), "num_samples": 16, "seq_len": 32, "eval_samples": 4,
    }  # fmt: skip
    return prepare(RunConfig(**config | given))


def test_half_of_the_rows_that_calibrate_and_score_are_sampled_and_none_that_judge(tmp_path: Path) -> None:
    """Two roundings of one run: what is held out of either has rows of both sources."""
    job = _job(tmp_path, sampled_share=0.5)
    found = stage.gather_rows(RunContext(job, Silent()))
    sources = {role: Counter(rows.sources) for role, rows in found.items()}
    assert sources["calibration"] == {"text.txt": 8, SELF: 8}
    assert sources["scoring"][SELF] == sources["scoring"]["text.txt"]
    assert sources["report"] == {"text.txt": 4}
    of_calibration = found["calibration"].sources
    for held in (is_held_out(torch.arange(16)), is_held_out_of_learning(16)):
        assert {of_calibration[row] for row in held.nonzero()[:, 0].tolist()} == {"text.txt", SELF}
    assert stage.sampled_tokens(job) == 32 * sum(counts[SELF] for counts in sources.values())

    without = stage.gather_rows(RunContext(_job(tmp_path), Silent()))
    assert set(without["calibration"].sources) == {"text.txt"}  # a CPU's default


def test_the_share_is_of_all_texts_together(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(random_text(1, 8000))
    job = _job(tmp_path, calibration=(str(tmp_path / "text.txt"), f"{other}=3"), sampled_share=0.25, num_samples=64)
    assert list(sampling.source_weights(job).values()) == pytest.approx([1, 3, 4 / 3])
    quotas = stage._shares(job, {"calibration": 64, "report": 8})
    assert [quota["calibration"] for quota in quotas.values()] == [12, 36, 16]
    assert [quota["report"] for quota in quotas.values()] == [2, 6, 0]
    few = stage._shares(_job(tmp_path, sampled_share=0.25), {"calibration": 1})  # none is left for the model
    assert [quota["calibration"] for quota in few.values()] == [1]


def test_a_gpu_samples_half_where_nothing_is_said_and_a_cpu_none() -> None:
    for device, given, share in (("cuda", {}, 0.5), ("cpu", {}, 0.0), ("cuda", {"sampled_share": 0.0}, 0.0)):
        config = RunConfig(model="m", target_bpw=4.0, **given)
        assert resolve_settings(config, device, None).sampled_share == share


def test_a_share_that_cannot_be_is_refused_and_a_default_that_cannot_be_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give self a weight"):
        stage.check_calibration(_job(tmp_path, calibration=(SELF,), sampled_share=0.5))
    job = _job(tmp_path, sampled_share=0.5, max_memory="1KB")
    large = replace(job, index=replace(job.index, source_format="fp8"))
    with pytest.raises(UsageError, match=r"--sampled-share 0\.5: rows cannot be sampled, as the original is quantized"):
        stage.check_calibration(large)
    left_to_the_run = replace(large, config=large.config.model_copy(update={"sampled_share": None}))
    stage.check_calibration(left_to_the_run)
    assert SELF not in sampling.source_weights(left_to_the_run)


def test_what_transformers_or_the_tokenizer_tells_ahead_hinders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path, sampled_share=0.5)
    assert sampling.can_sample(job)
    with monkeypatch.context() as patch:
        patch.setattr(type(job.skeleton), "can_generate", classmethod(lambda _: False))
        with pytest.raises(UsageError, match="does not load LlamaForCausalLM to generate text; give 0"):
            stage.check_calibration(job)
    monkeypatch.setattr(AutoModelForCausalLM, "_model_mapping", {})
    assert not sampling._loads_to_generate(job)  # transformers would load another class
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "feeds_decoder", lambda _: True)
    assert sampling._hindrance(job) == "as a decoder writes them, and rows are what the encoder reads"
    monkeypatch.undo()
    few = _job(tmp_path, model=str(tiny_llama(tmp_path / "few", vocab_size=100)), sampled_share=0.5)
    few.tokenizer().bos_token = "<extra_20>"
    with pytest.raises(UsageError, match="begin with token 119, and the model embeds 100 tokens"):
        stage.check_calibration(few)


def test_a_default_that_fails_under_way_leaves_the_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run goes on: its saved work is of these rows."""

    def fails(_: SampledModel) -> None:
        raise SamplingError("m: transformers cannot load it")

    job = _job(tmp_path)
    alone = stage.gather_rows(RunContext(_job(tmp_path, selection_data=job.config.calibration), Silent()))
    by_default = replace(job, settings=replace(job.settings, sampled_share=0.5))
    kept, reporter, said = dict[str, Any](), Silent(), list[str]()
    saved: Any = SimpleNamespace(load=kept.get, save=kept.__setitem__)
    monkeypatch.setattr(reporter, "warn", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "load_sampled", fails)
        with pytest.raises(SamplingError):
            stage.gather_rows(RunContext(_job(tmp_path, sampled_share=0.5), Silent()))
        context = RunContext(by_default, reporter, saved)
        found = stage.gather_rows(context)
    again = stage.gather_rows(context)
    assert said == ["the model writes no rows beside the texts: m: transformers cannot load it"] * 2
    for rows in (found, again):
        assert {role: set(part.sources) for role, part in rows.items()} == dict.fromkeys(alone, {"text.txt"})
        assert all(torch.equal(rows[role].tokens, alone[role].tokens) for role in alone)
    told = public_config(sampling.as_sampled(by_default, found["calibration"]))
    assert told["sampled_share"] == 0.0 and told["selection_data"] == ["text.txt"]  # so that a rerun has these rows
    assert sampling.as_sampled(_job(tmp_path, sampled_share=0.5), found["calibration"]).settings.sampled_share == 0.5


def test_where_one_of_several_ranks_fails_the_leader_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path)

    def rows(_: SampledModel, count: int, length: int, seed: int, *__: Any) -> Tensor:
        if seed == Ranks(2, 3).seed(job.config.seed):
            raise SamplingError("m: transformers cannot load it")
        return torch.zeros(count, length, dtype=torch.long)

    def sampled(ranks: Ranks) -> Tensor | str:
        try:
            return sampling._sampled(replace(job, ranks=ranks), sampling.Texts(6, 8, 1))
        except SamplingError as error:
            return str(error)

    monkeypatch.setattr(sampling, "generate_rows", rows)
    first, second, last = by_crew(3, sampled)
    assert first == "m: transformers cannot load it"
    assert isinstance(second, Tensor) and second.shape == (2, 8)
    assert isinstance(last, Tensor) and last.shape == (0, 8)


def test_a_rerun_is_told_a_share_that_it_can_take(tmp_path: Path) -> None:
    """What the report's configuration says, of a GPU's default and of what was asked for."""

    def told(share: float, **given: Any) -> float | None:
        job = _job(tmp_path, **given)
        job = replace(job, settings=replace(job.settings, sampled_share=share))
        found: float | None = public_config(job)["sampled_share"]
        stage.check_calibration(replace(job, config=job.config.model_copy(update={"sampled_share": found})))
        return found

    assert told(0.5) == 0.5 and told(0.0) == 0.0 and told(0.25, sampled_share=0.25) == 0.25
    assert told(0.5, calibration=(SELF,)) is None and told(0.0, calibration=(SELF,)) is None
    assert told(0.5, max_memory="1KB") == 0.0  # the whole model has no room


def test_as_many_rows_are_sampled_at_a_time_as_have_room(tmp_path: Path) -> None:
    config = SimpleNamespace(
        num_key_value_heads=8, num_attention_heads=32, num_hidden_layers=32, hidden_size=4096, vocab_size=128_256
    )
    config.get_text_config = lambda: config
    of_row = 2 * 32 * 8 * 128 * 128 * 2 + 16 * 128_256

    def rows(room: int | None) -> int:
        return batch_rows(config, 128, SampledModel(tmp_path, None, torch.device("cuda"), torch.bfloat16, room=room))

    assert rows(1 << 60) == 1024 and rows(0) == 8
    assert rows(2 * 256 * of_row) == 256 and rows(2 * 256 * of_row - 1) == 128
    assert rows(None) == 64
    config.num_hidden_layers = None
    assert rows(1 << 60) == 64


def test_a_gpu_measures_on_half_of_the_rows_where_these_are_many(tmp_path: Path) -> None:
    """Half has as many rows of each source; a CPU, experts and few tokens keep all."""
    job = _job(tmp_path, sampled_share=0.5, num_samples=64)
    rows = stage.calibration_rows(RunContext(job, Silent()), {"calibration": 64})["calibration"]
    rows = replace(rows, importance={"layer": torch.arange(64.0)[:, None]})
    on_gpu = replace(job, device=torch.device("cuda"))
    found = measuring_rows(on_gpu, rows)
    assert torch.equal(found.tokens, rows.tokens[:32]) and found.fingerprint != rows.fingerprint
    assert Counter(found.sources) == {"text.txt": 16, SELF: 16}
    assert found.importance is not None and found.importance["layer"].flatten().tolist() == list(range(32))
    assert measuring_rows(job, rows) is rows
    short = replace(on_gpu, settings=replace(job.settings, seq_len=8))
    assert measuring_rows(short, rows) is rows
    widest = max(linear.in_features for linear in job.structure.linears.values())
    assert 8 * 32 < SCARCE_TOKENS_PER_COLUMN * widest <= 32 * 32  # what the two cases rest on
