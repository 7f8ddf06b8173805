"""Quick answers are those of the functions that they stand for."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from hawqtool.runtime.imports import quick_scans

_MODELS = Path(transformers.__file__).parent / "models" / "__init__.py"


def _sorted(found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {module: sorted(set(names)) for module, names in found.items()}


def test_distributions_are_those_of_the_standard_library() -> None:
    found = quick_scans.distributions_of()
    assert _sorted(found) == _sorted(importlib.metadata.packages_distributions())
    assert "torch" in found["torch"]


def test_files_that_a_distribution_lists_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "some_thing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1\n")
    listed = ["gone/__init__.py,,", "lone.py,,", '"a,b.py",,', "../../bin/tool,,", "some_thing-1.dist-info/RECORD,,"]
    (info / "RECORD").write_text("\n".join(listed))
    (tmp_path / "~roken-1.dist-info").mkdir()  # what an interrupted installation leaves
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert quick_scans.distributions_of() == dict.fromkeys(["gone", "lone", "a,b"], ["some-thing"])


def test_the_standard_library_has_its_own_function_back() -> None:
    own = importlib.metadata.packages_distributions
    with quick_scans.quick_distributions():
        assert importlib.metadata.packages_distributions is quick_scans.distributions_of
    assert importlib.metadata.packages_distributions is own


def test_models_are_described_as_transformers_does() -> None:
    real = import_utils.define_import_structure
    expected = real.__wrapped__(str(_MODELS))
    before = real.cache_info().misses
    assert quick_scans._described_once(real)(str(_MODELS)) == expected
    assert real.cache_info().misses == before  # all of it was known


def test_another_form_is_read_again() -> None:
    asked = list[tuple[str, str | None]]()

    def real(module_path: str, prefix: str | None = None) -> quick_scans.Structure:
        asked.append((module_path, prefix))
        return {}

    quick_scans._described_once(real)("models/__init__.py")
    quick_scans._described_once(import_utils.define_import_structure)(str(_MODELS.parent / "llama" / "__init__.py"))
    assert asked == [("models/__init__.py", None)]


def test_models_are_imported_where_transformers_has_no_such_function(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = list[str]()

    def look(name: str) -> object:
        imported.append(name)
        return object() if name == quick_scans._UTILS else import_module(name)

    monkeypatch.setattr(quick_scans, "import_module", look)
    quick_scans.import_models()
    assert imported == [quick_scans._UTILS, quick_scans._MODELS]


def test_what_describes_models_is_put_back() -> None:
    real = import_utils.define_import_structure
    quick_scans.import_models()
    assert import_utils.define_import_structure is real
