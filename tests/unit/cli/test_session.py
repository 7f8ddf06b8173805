"""What a command says when it fails: one line of bounded length, and nothing of libraries between ours."""

from __future__ import annotations

import warnings

import pytest

from hawqtool.cli.session import session
from hawqtool.errors import InputError
from hawqtool.parsing import MAX_LINE


def test_a_line_quotes_no_file_at_length_and_keeps_what_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    error = InputError(f"found {'x' * 149_000}\x1b\n{'y' * 149_000}, expected less")
    error.add_note("the finished work is kept in .out.hawqtool")
    with pytest.raises(SystemExit) as end, session(json=True) as terminal:
        terminal.warn("z" * 149_000)
        raise error
    printed = capsys.readouterr()
    said, document = printed.err.splitlines()[-1], printed.out
    assert end.value.code == 4
    assert said.startswith("error: found xxx") and said.endswith("…; the finished work is kept in .out.hawqtool")
    assert len(said) < MAX_LINE + 100 and len(document) < MAX_LINE + 200
    assert len(terminal.warnings[0]) == 149_000


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_of_libraries_are_for_debugging(debug: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with session(debug=debug):
            warnings.warn("torch says", UserWarning, stacklevel=1)
    assert len(seen) == debug
