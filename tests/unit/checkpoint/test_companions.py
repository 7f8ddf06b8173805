"""What is copied beside the weights, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from hawqtool.checkpoint.companions import companion_files, companion_folders, left_folders
from hawqtool.checkpoint.links import check_links
from hawqtool.checkpoint.source import ALLOW_PATTERNS, IGNORE_PATTERNS, resolve_model
from hawqtool.errors import InputError
from tests.support.tiny import tiny_llama

KEPT = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "additional_chat_templates/tool_use.jinja",
    "modules.json",
    "tokenizer.json",
)
DROPPED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "checkpoint-500/config.json",
    "model.safetensors",
    "onnx/config.json",
    "original/params.json",
    "2_Dense/.cache/x",
    ".git/config",
    "4bit/model.safetensors",
)
MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*KEPT, *DROPPED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    return tmp_path


def test_folders_that_belong_to_the_checkpoint_are_copied(folder: Path) -> None:
    assert companion_files(folder) == KEPT
    assert companion_folders(folder) == ("additional_chat_templates", "1_Pooling", "2_Dense")
    assert left_folders(folder) == ("4bit", "checkpoint-500", "onnx", "original")


def test_the_hub_is_asked_for_them(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    fetched = set(filter_repo_objects(names, allow_patterns=[*ALLOW_PATTERNS], ignore_patterns=[*IGNORE_PATTERNS]))
    assert set(KEPT) <= fetched
    assert fetched - set(KEPT) == {
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    "modules", [{}, [1], [{"path": 3}], [{"path": "../x"}], [{"path": "/etc"}], [{"path": "a\0b"}]]
)
def test_modules_outside_the_folder_are_refused(folder: Path, modules: Any) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"modules\.json (is not a list of modules|names the module .*; expected a)"):
        companion_folders(folder)


def test_links_in_these_folders_are_checked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "secret").write_text("x")
    (folder / "onnx/secret").symlink_to(elsewhere / "secret")  # nobody looks there
    check_links(folder)
    (folder / "1_Pooling/secret").symlink_to(elsewhere / "secret")
    with pytest.raises(InputError, match="1_Pooling/secret is a link that leaves the folder"):
        check_links(folder)
    (folder / "1_Pooling/secret").unlink()
    (folder / "3_Normalize").symlink_to(elsewhere)
    with pytest.raises(InputError, match="3_Normalize is a link that leaves the folder"):
        check_links(folder)


def test_what_is_left_behind_is_said(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    (folder / "onnx").mkdir()
    (folder / "adapter_config.json").write_text("{}")
    folders, adapter = resolve_model(str(folder)).warnings
    assert folders == "folders of the source that are not copied: onnx"
    assert "adapter_config.json is not copied" in adapter
