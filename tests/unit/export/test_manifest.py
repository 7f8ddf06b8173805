"""The manifest: any file that is added, lost or changed is a problem of one line, also a shape in a header."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hawqtool.export.manifest import MANIFEST_FILE, files_below, seal, weight_hashes
from hawqtool.export.verify import verify_folder
from tests.support.packed_folder import write_packed
from tests.support.tiny import tiny_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "clean"
    write_packed(source, folder)
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "out"))


def only(folder: Path, *words: str) -> None:
    problems = verify_folder(folder).problems
    assert len(problems) == 1 and "\n" not in problems[0], problems
    assert all(word in problems[0] for word in words), problems


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of the header by as many."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def test_a_clean_folder_has_no_problem(clean: Path, source: Path) -> None:
    assert verify_folder(clean, source).problems == ()
    assert list(weight_hashes(clean)) == ["model.safetensors"]


def test_a_dtype_of_equal_size_in_a_header(folder: Path) -> None:
    edit_header(folder, b'"dtype":"BF16","shape":[64]', b'"dtype":"F16", "shape":[64]')
    only(folder, "norm.weight is F16 [64]", "says ['BF16', [64]]")


def test_a_shape_of_equal_size_in_a_header(folder: Path) -> None:
    edit_header(folder, b"[128,64]", b"[64,128]")
    assert any("says ['BF16', [128, 64]]" in line for line in verify_folder(folder).problems)


def test_the_text_of_a_header(folder: Path) -> None:
    edit_header(folder, b'{"format":"pt"}', b'{"format":"tf"}')
    only(folder, "the header or the size of model.safetensors")


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 1.0), ("rms_norm_eps", 0.5), ("vocab_size", 127), ("new", None)]
)
def test_any_key_of_the_config(folder: Path, key: str, value: object) -> None:
    edit(folder / "config.json", lambda config: config.update({key: value}))
    only(folder, "config.json differs", f": {key};")


def test_the_text_of_the_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text() + " ")
    only(folder, "config.json differs from its SHA-256 in reproduce/manifest.json; it changed")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_small_file(folder: Path, name: str) -> None:
    with (folder / name).open("a") as stream:
        stream.write(" ")
    only(folder, f"{name} differs from its SHA-256")
    (folder / name).unlink()
    only(folder, f"{name} is missing")


@pytest.mark.parametrize(
    "name",
    [
        "evil.py",
        "pytorch_model.bin",
        "adapter_config.json",
        "model-2.safetensors",
        "chat_template.jinja",
        "sub/x",
        ".x",
    ],
)
def test_an_added_file(folder: Path, source: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    only(folder, f"{name} is not in {MANIFEST_FILE}")
    seal_again(folder) if not name.endswith(".safetensors") else None
    assert any(f"{name} is neither in the source" in line for line in verify_folder(folder, source).problems)


def test_a_link_to_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").symlink_to(tmp_path, target_is_directory=True)
    only(folder, "sub is not in")


def test_files_that_are_free(folder: Path, source: Path) -> None:
    for name in ("README.md", "report.html", ".gitattributes"):
        (folder / name).write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("mine")
    assert verify_folder(folder, source).problems == ()
    assert ".git/config" not in files_below(folder)


def seal_again(folder: Path) -> None:
    seal(folder, json.loads((folder / "report.json").read_text()))


def test_the_report(folder: Path) -> None:
    edit(folder / "report.json", lambda report: report.update(kl=0))
    only(folder, "report.json differs from its SHA-256")
    edit(folder / "report.json", lambda report: report.pop("kl"))
    assert verify_folder(folder).problems == ()  # the layout of its text is free
    (folder / "report.json").write_text("[]")
    only(folder, "report.json is not a JSON object")
    (folder / "report.json").unlink()
    only(folder, "report.json is missing")


def test_the_manifest(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    edit(path, lambda manifest: manifest["files"]["tokenizer.json"].update(bytes=1))
    only(folder, f"{MANIFEST_FILE} differs from its SHA-256 in report.json")
    path.write_text("{}")
    only(folder, f"{MANIFEST_FILE} does not have the expected fields")
    path.unlink()
    only(folder, f"{MANIFEST_FILE} is missing")


def test_weights_without_their_checksums_are_hashed_whole(folder: Path) -> None:
    (folder / "reproduce/checksums.json").write_text("{")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert any("model.safetensors differs from its SHA-256" in line for line in verify_folder(folder).problems)


def test_files_that_differ_from_the_source(folder: Path, source: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    seal_again(folder)
    assert verify_folder(folder).problems == ()
    assert verify_folder(folder, source).problems == (
        "generation_config.json of the source is missing; expected a copy; restore it",
        "tokenizer.json differs from the source's; expected equal bytes; restore it",
    )
