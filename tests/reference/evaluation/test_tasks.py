"""Answers to multiple-choice questions against a plain forward of each row in float64, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hawqtool.config import RunConfig
from hawqtool.data.choices import Question, read_questions
from hawqtool.errors import InputError
from hawqtool.evaluation import tasks
from hawqtool.evaluation.tasks import answers, task_result
from hawqtool.pipeline.run.job import prepare
from hawqtool.report.wording import task_lines
from tests.support.tiny import tiny_model

LINES = [
    {"input": "the cat sat on ", "choices": ["a mat", "the moon", "it"], "answer": 0},
    {"input": "two and two is", "choices": ["four", "five"], "answer": 1},
    {"input": "", "choices": ["yes indeed", "no"], "answer": 1},
] * 4  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tasks") / "model")


def written(folder: Path, lines: list[Any]) -> str:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_answers_are_those_of_a_plain_forward(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    questions = read_questions(written(tmp_path, LINES), tokenizer, 64)
    expected = []
    for line in LINES:
        scores = []
        for choice in line["choices"]:  # type: ignore[attr-defined]
            given = str(line["input"]).rstrip()
            row = tokenizer(f"{given} {choice}" if given else choice).input_ids
            start = max(1, len(tokenizer(given).input_ids))
            with torch.no_grad():
                log_p = plain(torch.tensor([row])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, row[i]]) for i in range(start, len(row))))
        expected.append(scores.index(max(scores)))
    job = prepare(RunConfig(model=str(model), device="cpu", batch_size=3), writes=False)
    monkeypatch.setattr(tasks, "TOKENS_TOGETHER", 100)  # several walks
    assert answers(job.stream(), questions, 3, lambda _: None).tolist() == expected
    assert len(set(expected)) > 1


def test_accuracy_and_paired_difference() -> None:
    questions = [Question(((1, 2), (1, 3)), (1, 1), answer) for answer in (0, 0, 1, 1)]
    found = task_result("t", questions, torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 0]))
    assert (found["original"], found["quantized"], found["difference"], found["same"]) == (0.75, 0.5, -0.25, 0.75)
    assert found["original_stderr"] == pytest.approx(0.25) and found["difference_stderr"] == pytest.approx(0.25)
    assert "75.0 % -> 50.0 %, -25.0 ± 25.0 points on 4 questions" in task_lines([found])[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"input": "a", "choices": ["b"], "answer": 0}], "names none of 1 choices"),
        ([{"input": "a", "choices": ["b", "c"], "answer": 2}], "answer 2 names none of 2 choices"),
        ([{"input": "a", "choices": ["b", "c"], "answer": True}], "answer True names none"),
        ([{"text": "a"}], "line 1 is no question; expected"),
        ([7], "line 1 is no question"),
        ([], "has no questions"),
        ([{"input": "a " * 99, "choices": ["b", "c"], "answer": 0}], "the model takes 64; shorten the input"),
    ],
)
def test_what_is_no_question_is_refused(lines: list[Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(written(tmp_path, lines), AutoTokenizer.from_pretrained(model), 64)
    with pytest.raises(InputError, match="is no JSON-lines file here"):
        read_questions("arc_easy", None, 64)
