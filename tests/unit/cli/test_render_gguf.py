"""What is printed of a GGUF file at the end of its run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hawqtool.cli.render_gguf import print_gguf
from hawqtool.report.documents import GgufDocument


def test_the_end_has_sizes_the_search_and_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"stored_bytes": 9, "bpw_linears": 5.5, "divergence": {"selection": 0.001031}}
    document: dict[str, Any] = {
        "output": "o.gguf",
        "bytes": 1000,
        "bpw": 5.5,
        "num_weights": 16,
        "types": {"a": "Q5_0", "b": "Q8_0", "c": "Q5_0"},
        "kept": {},
        "quality": None,
        "search": {"bound": 0.001, "trials": [trial]},
        "seconds": 61.0,
    }
    print_gguf(cast(GgufDocument, document), "my files/o.gguf", "model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "file        o.gguf: 1,000 bytes (1.0 kB)",
        "stored      5.5000 bits per weight over 16 weights",
        "types       Q5_0 x2, Q8_0 x1",
    ]
    assert lines[3] == "searched    5.500 bits: 0.00103 on the selection rows, misses"
    assert lines[4] == "done        in 61 s; the record is my files/o.gguf.json"
    assert lines[5:] == [
        "next        llama-cli -m 'my files/o.gguf'",
        "            hawqtool verify 'my files/o.gguf' --against model",
    ]
