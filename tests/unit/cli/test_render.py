"""What ``quantize`` says at its end: within the terminal, with every plan, the search and the gates."""

from __future__ import annotations

import pytest
from rich.console import Console

from hawqtool.cli.render import closing_lines, fitted, hanging, print_report, result_lines
from tests.unit.pipeline.test_report import a_report, a_search, uniform

WIDTH = 100


def test_the_result_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    report = a_report(experts={}, warnings=["[bold]a warning[/bold] " * 12], **a_search())
    print_report(report, "out", 100)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    # Numbers are not torn from their standard errors.
    assert any("0.4000 ± 0.0100" in line for line in lines)
    assert any(line.startswith("            [bold]a warning") for line in lines)


@pytest.mark.parametrize(("columns", "spared"), [(80, []), (70, ["file"]), (60, ["file", "perplexity"])])
def test_no_word_is_broken_on_narrow_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, spared: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_report(a_report(experts={}, **a_search()), "out", 100)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for whole in ("┃ model", "original", "same top-1", "0.4000 ± 0.0100"):
        assert any(whole in line for line in lines), whole
    for name in ("file", "perplexity"):
        assert any(f" {name} ┃" in line for line in lines) == (name not in spared), name


def test_all_plans_the_search_and_the_gates_are_listed() -> None:
    report = a_report(experts={}, **a_search())
    report["timings"] |= {"round kron": 2.0, "round uniform w3g64": 3.0}
    lines = result_lines(report)
    tried = [line for line in lines if line.startswith("tried")]
    assert tried[0] == "tried       kron          3.750 bits, 0.4500, -0.2000 ± 0.0200 to uniform (the best)"
    assert tried[1] == "tried       width swap 1  3.750 bits, 0.5000, -0.1500 ± 0.0200 to uniform"
    searched = [line for line in lines if line.startswith("searched")]
    assert ["misses" in line for line in searched] == [True, False, False]
    assert "gate        target_kl at most 0.35, found 0.3: passed" in lines
    assert "round 5 s" in lines[-2]
    said = "choosing the plan took 3.0 s of 7.1 s; with it given a run takes at most 4.1 s, of which rounding is 2.0 s"
    assert lines[-1].strip() == said
    assert "round 5 s" in result_lines(report | {"starts": 2})[-1], "the times of the last start say little"


def test_a_mixed_plan_that_is_uniform_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    report = a_report(experts={}, shipped="uniform")
    alone = uniform(4, 0.6)
    tried = {"kron": alone | {"minus_uniform": {}, "predicted_loss": 0.1}}
    report["evaluation"] |= {"mixed": alone | {"chosen_by": "kron"}, "uniform": alone, "tried": tried}
    print_report(report, "out", 100)
    said = capsys.readouterr().out
    assert "mixed  " not in said and "paired" not in said


def test_text_hangs_below_its_label() -> None:
    assert hanging("size        " + "word " * 4, 24) == "size        word word\n            word word"


def test_the_first_screen_wraps_between_words_on_a_terminal_only() -> None:
    line = "size        269.1 MB now, 112.8 MB (112,760,696 bytes) afterwards, and quite a few words more than fit here"
    narrow, plain = Console(width=60, force_terminal=True), Console(width=60, force_terminal=False)
    parts = fitted(line, narrow).splitlines()
    assert fitted(line, plain) == line and len(parts) > 1 and parts[1].startswith(" " * 12)
    assert max(map(len, parts)) <= 60 and " ".join(part.strip() for part in parts).split() == line.split()


def test_the_end_says_how_much_smaller_or_larger_the_file_is() -> None:
    report = a_report(experts={})
    expected = {500: "2.00 times smaller", 999: "as large as the original", 1250: "1.25 times larger"}
    for quantized, said in expected.items():
        report["sizes"] |= {"original_bytes": 1000, "quantized_bytes": quantized}
        assert closing_lines(report, "out", 5)[0] == f"done        {said}, in 5 s; look at out/report.html"
