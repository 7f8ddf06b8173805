"""The model card: front matter merged, figures of the report, nothing of a checkpoint interpreted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from hawqtool.evaluation.gates import judge
from hawqtool.report.card import model_card
from hawqtool.report.escape import code, escape, fenced

README = """---
license: other
license_name: my-licence
license_link: LICENSE.md
language: [en, no]
library_name: transformers
pipeline_tag: text-generation
tags: [chat, hawqtool]
datasets: [org/data]
base_model: org/base
model-index: [{name: x}]
---
# The original

Scores 99 % everywhere.
"""
HOSTILE = "<script>alert(1)</script> [x](javascript:1) ![i](https://e.vil/p.png) | a\n# head\n`c` www.e.vil **b**"


def quality(kl: float, *formats: str) -> dict[str, Any]:
    values = {"kl": kl, "kl_stderr": 0.01, "perplexity": 20 + kl, "same_top": 0.7, "num_tokens": 6144}
    return values | ({"formats": list(formats), "stored_bytes": 100 + len(formats)} if formats else {})


def a_report(**changes: Any) -> dict[str, Any]:
    rows = {"source": "self", "count": 16, "kind": "tokens", "shape": [256], "fingerprint": "f"}
    entry = {"unit": "u", "symmetric": True, "bytes": 10}
    names = [f"model.layers.{block}.{leaf}" for block in range(2) for leaf in ("attn.q_proj", "mlp.down_proj")]
    report: dict[str, Any] = {
        "schema": "hawqtool.report/2",
        "model": "tiny-llama",
        "model_revision": None,
        "source_format": None,
        "architecture": "LlamaForCausalLM",
        "hawqtool_version": "0.1.0",
        "command": "hawqtool quantize tiny-llama -o out --target-bpw 3.5",
        "config": {"rounding": "gptq", "seed": 7, "plan": None},
        "sizes": {"original_bytes": 1000, "quantized_bytes": 400, "bpw_linears": 3.497, "bpw_file": 6.137},
        "metric": "kron",
        "experts": {},
        "kept": {"bytes": 0, "share": 0.0, "rows": []},
        "plan": [entry | {"name": n, "bits": 3 + i, "group_size": (64, "channel")[i % 2]} for i, n in enumerate(names)],
        "engines": [
            {
                "engine": "vLLM (CUDA)",
                "minimum_version": "0.33",
                "loads": False,
                "reason": "by its source, not run",
                "tried": False,
            }
        ],
        "rows": dict.fromkeys(("calibration", "scoring", "selection", "report"), rows)
        | {"overlap": 0, "report_in_domain": True},
        "evaluation": {
            "measure": "kl",
            "original": quality(0.0),
            "uniform": quality(0.46, "w3g32"),
            "mixed": quality(0.40, "w3g64", "w4ch") | {"chosen_by": "kron"},
            "tried": {"kron": quality(0.40, "w3g64", "w4ch")},
            "mixed_minus_uniform": {"kl": -0.0561, "kl_stderr": 0.0083},
        },
        "shipped": "mixed",
        "search": None,
        "gates": [],
        "device": "cpu",
        "warnings": ["damping had to be raised for 2 layers, first model.layers.0.q_proj"],
    }
    return report | changes


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    start, front, body = card.split("---\n", 2)
    assert start == ""
    loaded = yaml.safe_load(front)
    assert isinstance(loaded, dict)
    return loaded, body


# Front matter.


def test_the_source_is_merged() -> None:
    front, body = split(model_card(a_report(), README))
    assert front == {
        "license": "other",
        "license_name": "my-licence",
        "license_link": "LICENSE.md",
        "language": ["en", "no"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["org/data"],
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "tags": ["chat", "hawqtool", "compressed-tensors"],
    }
    # Scores of the original are not those of this model, and its text is not repeated.
    assert "not carried over: model-index." in body.replace("\\", "")
    assert "99" not in body
    assert "licence `other`, name `my-licence`, text at `LICENSE.md`" in body


def test_the_base_model_is_the_hub_id_where_there_is_one() -> None:
    report = a_report(model="org/name", model_revision="0123abc")
    assert split(model_card(report, README))[0]["base_model"] == "org/name"
    assert split(model_card(a_report(), None))[0]["base_model"] == "tiny-llama"
    stated = report | {"config": report["config"] | {"base_model": "org/true-base"}}
    assert split(model_card(stated, README))[0]["base_model"] == "org/true-base"


def test_a_card_tells_hubs_library_and_task_and_people_what_to_type() -> None:
    engine = {"engine": "vLLM (CUDA)", "minimum_version": "0.33", "loads": True, "reason": "r", "tried": False}
    front, body = split(model_card(a_report(engines=[engine | {"gain": "stays packed"}]), None))
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert all(text in body for text in ("pip install", "from_pretrained", "vllm serve", "vLLM (CUDA): stays packed"))
    front, body = split(model_card(a_report(architecture="ViTForImageClassification"), None))
    assert front["pipeline_tag"] == "image-classification" and "vllm serve" not in body


@pytest.mark.parametrize("readme", [None, "# A title\n", "---\nlanguage: en\n---\n", ""])
def test_a_licence_is_not_invented(readme: str | None) -> None:
    front, body = split(model_card(a_report(), readme))
    assert "license" not in front
    assert "**The source's card states no licence**" in body


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        ("---\nlicense: !!python/object/apply:os.system ['touch hacked']\n---\n", "no plain YAML"),
        ("---\nlicense: [a\n---\n", "no plain YAML"),
        ("---\nlicense: " + "[" * 20_000 + "\n---\n", "no plain YAML"),
        ("---\n- license\n- mit\n---\n", "no mapping"),
        ("---\njust text\n---\n", "no mapping"),
        ("---\nlicense: mit\n# no end", "without its closing line"),
        ("license: mit\n---\n", "has no front matter"),
        ("---\na: &a {x: y}\nb: {!!merge <<: [*a, *a]}\n---\n", "has front matter that is no plain YAML"),
        ("---\n---\n", "has no front matter"),
        ("---\nlicense: " + "x" * 70_000 + "\n---\n", "more than 64,000 characters"),
        ("---\n? [a, b]\n: c\n---\n", "YAML|no mapping"),
    ],
)
def test_broken_or_hostile_front_matter_is_left_out(readme: str, said: str) -> None:
    front, body = split(model_card(a_report(), readme))
    assert set(front) == {"library_name", "pipeline_tag", "base_model", "base_model_relation", "tags"}
    assert re.search(said, body)


@pytest.mark.parametrize(
    "line",
    [
        "license: {a: b}",
        "license: 'x" + "y" * 400 + "'",
        'license: "a\\nb: c"',
        'license: "a\\u001b[31m"',
        "license: [[a]]",
        "license: ''",
        "license_link: 'javascript:alert(1)'",
        "license_link: https://a b",
        "tags: [" + ", ".join(["t"] * 300) + "]",
    ],
)
def test_values_that_are_no_short_text_are_left_out(line: str) -> None:
    front, body = split(model_card(a_report(), f"---\nlanguage: en\n{line}\n---\n"))
    assert front["language"] == "en"
    key = line.partition(":")[0]
    assert key not in front or front[key] == ["hawqtool", "compressed-tensors"]
    assert key in body.replace("\\", "")


def test_aliases_do_not_multiply() -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nlicense: &c [*b, *b]\nlanguage: &l [en, de]\ndatasets: *l\n"
    card = model_card(a_report(), f"---\n{bomb}---\n")
    front, _ = split(card)
    assert front["language"] == front["datasets"] == ["en", "de"]
    assert "license" not in front and "&" not in card.split("---\n")[1]


def test_aliases_without_end_are_not_walked() -> None:
    levels = "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))
    front, _ = split(model_card(a_report(), f"---\na0: &a0 [x, x]\n{levels}tags: *a60\nlicense: mit\n---\n"))
    assert front["license"] == "mit"


# Injection.


def test_nothing_of_a_checkpoint_is_interpreted() -> None:
    report = a_report(model=HOSTILE, architecture=HOSTILE, warnings=[HOSTILE])
    report["plan"][0]["name"] = f"model.layers.0.{HOSTILE}"
    report["engines"][0]["reason"] = HOSTILE
    report["rows"]["calibration"] = report["rows"]["calibration"] | {"source": HOSTILE}
    licence = HOSTILE.replace("\n", " ").replace("'", "")
    front, body = split(model_card(report, f"---\nlicense: '{licence}'\n{HOSTILE.splitlines()[0]}: x\n---\n"))
    assert front["license"] == licence
    assert "<" not in body and "\n# head" not in body
    assert not re.search(r"(?<!\\)\[x|(?<!\\)!\\?\[i|https://|www\.|(?<!\\)\*\*b", body)
    columns: int | None = None
    for line in body.splitlines():
        # Every row of a table has as many cells as its head.
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert columns is None or found is None or found == columns
        columns = found
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1


def test_a_command_cannot_close_its_block() -> None:
    command = "hawqtool quantize 'a\n```\n# head <b>' -o out"
    _, body = split(model_card(a_report(command=command), None))
    assert f"````sh\n{command}\n````" in body


def test_escapes() -> None:
    assert escape("a|b <i> & *c* 1.5 x-y") == "a\\|b &lt;i&gt; &amp; \\*c\\* 1.5 x-y"
    assert escape("1. item") == "1\\. item" and escape("- item") == "\\- item"
    assert escape("a\x1b[31m\u202eb\n\tc") == "a \\[31m b c"
    assert len(escape("x" * 1000)) == 200
    assert code("model.layers.0") == "`model.layers.0`"
    assert code("a`b") == "a\\`b"
    assert fenced("x", "sh") == "```sh\nx\n```"


# The body.


def test_a_card_for_mixed() -> None:
    _, body = split(model_card(a_report(), README))
    assert "# tiny-llama, 3.50 bits per weight" in body
    assert "| original | 20.00 | 0.0000 ± 0.0100 | 70.0 % |" in body
    assert "| mixed (w3g64, w4ch), shipped | 20.40 | 0.4000 ± 0.0100 | 70.0 % |" in body
    assert "| uniform (w3g32) | 20.46 | 0.4600" in body
    assert "mixed - uniform: -0.0561 ± 0.0083" in body
    assert "in-domain" in body
    assert "metric `kron`" in body and "`gptq`" in body
    assert "16 rows of 256 tokens (sampled from the model itself), seed 7" in body
    assert "| `q_proj` | 1 |  | 1 |  |" in body
    assert "3 bit, groups of 64" in body and "4 bit, one scale per row" in body
    assert "400 bytes (40.0 %)" in body
    assert "hawqtool quantize tiny-llama -o out --target-bpw 3.5" in body
    assert "warning: damping had to be raised" in body
    assert "AutoModelForCausalLM.from_pretrained" in body


def test_only_what_the_run_did_is_called_verified() -> None:
    _, body = split(model_card(a_report(), None))
    verified = [line for line in body.splitlines() if "verified" in line]
    assert len(verified) == 1 and verified[0].startswith("| hawqtool | 0.1.0 | yes |")
    assert "| vLLM (CUDA) | 0.33 | no | by its source, not run |" in body


def test_a_card_for_uniform_that_won() -> None:
    _, body = split(model_card(a_report(shipped="uniform", metric=None), None))
    assert "| uniform (w3g32), shipped |" in body
    assert "| mixed (w3g64, w4ch) |" in body
    assert "the mixed one was not better for sure on the selection rows" in body


def test_a_card_names_the_short_list_and_the_gates() -> None:
    report = a_report()
    plans = ("kron", "by-role rule", "width swap 1", "width swap 2")
    report["evaluation"]["tried"] = dict.fromkeys(plans, report["evaluation"]["mixed"])
    report["evaluation"]["mixed"]["chosen_by"] = "width swap 1"
    report["gates"] = [judge("target_kl", 0.3, 0.4)]
    body = split(model_card(report, None))[1]
    assert "chosen per layer under a budget of stored bytes; of" in body
    assert "of the plans `kron`, `by-role rule` and 2 that swaps of widths gave, `width swap 1` diverged least" in body
    assert "0.4, at most 0.3 was asked for, **failed**" in body


def test_a_card_tells_of_a_search() -> None:
    trials = [{"stored_bytes": 1, "bpw_linears": 3.0, "divergence": {"selection": 0.2, "report": 0.2}}] * 3
    search = {"bound": 0.25, "met": True, "trials": trials, "largest_that_misses": None}
    body = split(model_card(a_report(search=search), None))[1]
    assert "of 3 plans that were rounded and measured, the smallest with a divergence of at most 0.25" in body
    body = split(model_card(a_report(search=search | {"met": False}), None))[1]
    assert "the best one, as none has a divergence of at most 0.25" in body


@pytest.mark.parametrize("shipped", ["uniform", "mixed"])
def test_a_card_for_one_choice_shows_one_row(shipped: str) -> None:
    same = quality(0.46, "w4g64")
    evaluation = a_report()["evaluation"] | {"uniform": same, "mixed": same | {"chosen_by": "uniform menu"}}
    evaluation |= {"mixed_minus_uniform": {"kl": 0.0}, "tried": {"uniform menu": same}}
    _, body = split(model_card(a_report(shipped=shipped, metric=None, evaluation=evaluation), None))
    assert f"| {shipped} (w4g64), shipped |" in body
    assert body.count("(w4g64)") == 1
    assert "Paired difference" not in body
    assert "no sensitivity was measured" in body


def test_a_card_for_a_plan_without_uniform() -> None:
    evaluation = {"measure": "kl", "original": quality(0.0), "uniform": None} | {"mixed": quality(0.4, "w2g64")}
    evaluation["mixed"]["kl_stderr"] = float("nan")
    config = {"rounding": "rtn", "seed": 0, "plan": "plan.json"}
    _, body = split(model_card(a_report(evaluation=evaluation, config=config, metric=None), None))
    assert "as given by the plan `plan.json`" in body
    assert "| mixed (w2g64), shipped | 20.40 | 0.4000 |" in body
    assert "No uniform plan fits the budget" in body
    assert "uniform (" not in body


def test_foreign_rows_are_not_called_in_domain() -> None:
    report = a_report()
    report["rows"] = report["rows"] | {"report_in_domain": False}
    assert "in-domain" not in model_card(report, None)


def test_other_tasks_load_with_their_class() -> None:
    _, body = split(model_card(a_report(architecture="ViTForImageClassification"), None))
    assert "ViTForImageClassification.from_pretrained" in body and "AutoProcessor" in body


def test_an_embedding_in_8_bits_is_not_said_to_be_as_in_the_original() -> None:
    config = {"rounding": "gptq", "seed": 7, "plan": None, "embedding_bits": 8}
    body = model_card(a_report(config=config), None)
    assert "The embedding takes 8 bits. Everything else (norms, " in body and "(embeddings, output head" not in body
    assert "## Kept\n\nNo matrix stays as it is.\n" in body
    assert "Everything else (embeddings, output head, norms, " in model_card(a_report(), None)
