"""A verified folder on a hub of this machine: every byte arrives, stale weights go, refusals are one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hawqtool.errors import InputError, UsageError
from hawqtool.pipeline.push import run_push
from tests.support.packed_folder import write_packed
from tests.support.tiny import tiny_model
from tests.support.upload_hub import TOKEN, UploadHub, running_upload_hub

NAME = "org/tiny-4bit"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_packed(tiny_model("llama", folder / "source"), folder / "out")
    return folder / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with running_upload_hub() as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_file_arrives_and_stale_weights_go(clean: Path, hub: UploadHub) -> None:
    found = run_push(clean, NAME, private=True)
    assert hub.repositories[NAME]["main"] == content(clean) and hub.private == {NAME}
    assert found["files"] == len(content(clean)) and found["url"] == f"{hub.endpoint}/{NAME}"
    hub.repositories[NAME]["main"] |= {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    run_push(clean, NAME)
    assert hub.repositories[NAME]["main"] == content(clean) | {"notes.txt": b"mine"}


def test_a_branch_is_made(clean: Path, hub: UploadHub) -> None:
    assert run_push(clean, NAME, revision="w4")["revision"] == "w4"
    assert hub.repositories[NAME] == {"main": {}, "w4": content(clean)}


def test_what_verify_refuses_is_not_uploaded(clean: Path, hub: UploadHub, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(clean, tmp_path / "out"))
    (damaged / "evil.py").write_text("import os")
    with pytest.raises(InputError, match="nothing was uploaded, hawqtool verify lists"):
        run_push(damaged, NAME)
    assert not hub.repositories


def test_a_public_repository_stays_untouched_where_private_was_asked(clean: Path, hub: UploadHub) -> None:
    hub.repositories[NAME] = {"main": {}}
    with pytest.raises(UsageError, match="exists and is public"):
        run_push(clean, NAME, private=True)
    assert hub.commits == 0


@pytest.mark.parametrize("name", ("tiny", "a/b/c", "org/na me", "org/name@main"))
def test_a_name_that_is_none(name: str, clean: Path) -> None:
    with pytest.raises(UsageError, match="expected org/name"):
        run_push(clean, name)


def test_no_token_and_no_hub(clean: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="log in with `hf auth login`"):
        run_push(clean, NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        run_push(clean, NAME)
