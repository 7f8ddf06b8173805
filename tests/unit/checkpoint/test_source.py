"""Which names of models are refused before anything is read or fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.checkpoint.source import require_model
from hawqtool.errors import InputError


def test_a_folder_may_be_named_as_gguf_files_are(tmp_path: Path) -> None:
    for name, found in (("file.gguf", "is a GGUF file"), ("none.gguf", "does not exist")):
        (tmp_path / "file.gguf").touch()
        with pytest.raises(InputError, match=f"{name} {found}; expected a checkpoint"):
            require_model(str(tmp_path / name))
    (tmp_path / "model.gguf").mkdir()
    require_model(str(tmp_path / "model.gguf"))
