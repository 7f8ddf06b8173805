"""What is kept: grouped by reason and pattern, loud above its share, and a limit that is known before the work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hawqtool.cli.render import kept_lines
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.model.kept import CONVOLUTION, EMBEDDING, HEAD, LOUD_SHARE, KeptTensor
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.search.gates import check_gates
from hawqtool.pipeline.stages.report import kept_record, kept_warnings
from hawqtool.report.page.html_tables import kept_table


def job(bytes_of_convolutions: int, **config: Any) -> Job:
    names = {"model.embed.weight": (EMBEDDING, 500), "lm_head.weight": (HEAD, 100)}
    names |= {f"model.layers.{i}.conv.weight": (CONVOLUTION, bytes_of_convolutions) for i in range(2)}
    kept = tuple(KeptTensor(reason, name, name, size, 2) for name, (reason, size) in names.items())
    other = SimpleNamespace(num_bytes=1000 - sum(t.num_bytes for t in kept))
    tensors = {t.name: t for t in kept} | {"model.layers.0.q.weight": other}
    task = SimpleNamespace(generates=True, logits=True)
    return cast(
        Job,
        SimpleNamespace(
            structure=SimpleNamespace(kept=kept), index=SimpleNamespace(tensors=tensors), task=task, tables=(),
            config=RunConfig(model="m", **config),
        ),
    )  # fmt: skip


def test_tensors_of_a_pattern_are_one_row_and_what_all_models_have_does_not_count() -> None:
    kept = kept_record(job(30))
    assert kept["bytes"] == 60 and kept["share"] == pytest.approx(0.06)
    assert [(row["reason"], row["count"], row["bytes"], row["pattern"]) for row in kept["rows"]] == [
        (EMBEDDING, 1, 500, "model.embed.weight"),
        (HEAD, 1, 100, "lm_head.weight"),
        (CONVOLUTION, 2, 60, "model.layers.*.conv.weight"),
    ]
    assert kept["rows"][2]["example"] == "model.layers.0.conv.weight"
    line = "kept        embeddings and head stay as they are, and 60 B (6.0 % of the weights) beside them"
    assert kept_lines(kept)[0] == line
    assert "<td>model.layers.*.conv.weight</td>" in kept_table(kept)


def test_an_embedding_that_takes_8_bits_is_not_said_to_stay() -> None:
    embedding, head, convolution = kept_record(job(30))["rows"]
    for rows, others, said in (
        ([embedding], 0, "embeddings stay as they are"),
        ([head, convolution], 60, "the head stays as it is, and 60 B (6.0 % of the weights) beside them"),
        ([convolution], 60, "60 B (6.0 % of the weights) stay as they are"),
        ([], 0, "nothing but small tensors, such as norms"),
    ):
        assert kept_lines({"bytes": others, "share": others / 1000, "rows": rows})[0] == f"kept        {said}"


def test_loud_above_the_share() -> None:
    assert kept_warnings(kept_record(job(int(500 * LOUD_SHARE)))) == []
    (warning,) = kept_warnings(kept_record(job(int(500 * LOUD_SHARE) + 1)))
    assert "model.layers.*.conv.weight (convolution); --max-kept sets a limit" in warning


def test_the_limit_is_judged_before_the_work() -> None:
    check_gates(job(30, max_kept="6%"))
    with pytest.raises(UsageError, match="6 % of the weights stay as they are .* more than --max-kept 5.9 %"):
        check_gates(job(30, max_kept="5.9%"))
