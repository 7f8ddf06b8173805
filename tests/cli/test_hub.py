"""Models from a hub: what is fetched, what is recorded, and one line for each way to fail."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from hawqtool.checkpoint.index import read_index
from hawqtool.checkpoint.source import MAY_FETCH, hub_id, resolve_model
from hawqtool.cli.app import app
from hawqtool.errors import InputError
from hawqtool.export.writer import copy_small_files
from tests.support.hub import SHA, Hub, running_hub
from tests.support.tiny import tiny_llama

INSTALLED = Path(sys.executable).parent / "hawqtool"
SMALL = ("--num-samples", "8", "--seq-len", "16", "--group-size", "32", "--device", "cpu", "--eval-samples", "4")
TARGET = ("--bits", "4", "--target-bpw", "4.5")
OTHER_FORMS = (
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "model-00001-of-00001.fp16.safetensors",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "model-Q4_K.gguf",
    "original/model.safetensors",
    "onnx/model.onnx",
    "flax_model.msgpack",
    "tf_model.h5",
)
"""Weights beside the right ones; each file holds something that would break a run that read it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights in many forms."""
    folder = tiny_llama(tmp_path_factory.mktemp("hub") / "tiny")
    for name in OTHER_FORMS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not these weights")
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories = {"org/tiny": model, "org/gated": model, "org/forbidden": model}
        hub.refused = {"org/gated": (401, "GatedRepo"), "org/forbidden": (403, "")}
        yield hub


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub for calls in this process, with an empty cache and the network allowed."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


def installed(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command with this hub, a cache of its own, and no wish of the user's about being offline."""
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", MAY_FETCH}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [str(INSTALLED), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)


def forbid_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(MAY_FETCH, raising=False)


def only_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if not line.startswith("fetching ")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_a_hub_id_is_fetched_pinned_and_runs_again_offline(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = here
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=1200)))
    home, first, second = tmp_path / "home", tmp_path / "first", tmp_path / "second"
    options = ("--calibration", text, *SMALL)
    done = installed(hub, home, "quantize", "org/tiny", "-o", first, *options, *TARGET, "--json")
    assert done.returncode == 0, done.stderr
    assert "fetching org/tiny from the hub" in done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["model_revision"]) == ("org/tiny", SHA)
    config = yaml.safe_load((first / "reproduce/config.yaml").read_text())
    assert config["model"] == f"org/tiny@{SHA}"
    assert not hub.fetched & set(OTHER_FORMS)
    assert [path.name for path in first.rglob("*.safetensors")] == ["model.safetensors"]
    assert (first / "LICENSE").read_text() == "terms"
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forbid_the_network(monkeypatch)
    recorded = ("-c", first / "reproduce/config.yaml", "-o", second, "--calibration", text)
    again = CliRunner().invoke(app, ["quantize", *map(str, recorded)])
    assert again.exit_code == 0, again.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    verified = CliRunner().invoke(app, ["verify", str(first), "--against", f"org/tiny@{SHA}"])
    assert verified.exit_code == 0, verified.stderr
    assert hub.requests == []


def test_offline_without_a_copy_is_one_line(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forbid_the_network(monkeypatch)
    done = CliRunner().invoke(app, ["quantize", "org/tiny", "-o", str(output), *TARGET])
    assert done.exit_code == 4
    assert "HF_HUB_OFFLINE forbids" in only_line(done.stderr)
    assert here.requests == [] and not output.exists()


def test_a_refusal_through_the_command_is_one_line(here: Hub, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", "org/gated", "-o", str(tmp_path / "out"), *TARGET])
    assert done.exit_code == 4
    assert "gated" in only_line(done.stderr) and done.stdout == ""


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("org/none", "neither a folder nor a repository"),
        ("org/tiny@v9", "no revision v9"),
        (f"org/tiny@{'0' * 40}", f"no revision {'0' * 40}"),
        ("org/gated", "is gated"),
        ("org/forbidden", "403"),
    ],
)
def test_refusals_say_what_to_do(here: Hub, spec: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(spec)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_no_network_is_one_line_and_a_cached_branch_still_works(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model("org/tiny@main").revision == SHA
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/tiny@main").revision == SHA
    with pytest.raises(InputError, match="cannot be reached") as caught:
        resolve_model("org/gated")
    assert "\n" not in str(caught.value)


def test_an_incomplete_copy_is_not_used(here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (resolve_model("org/tiny").folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv(MAY_FETCH, raising=False)
    with pytest.raises(InputError, match="incomplete") as caught:
        resolve_model("org/tiny")
    assert "\n" not in str(caught.value)


def test_the_command_lines_offline_default_is_lifted_for_the_fetch_only(
    here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(MAY_FETCH, "1")
    assert resolve_model("org/tiny").name == "org/tiny"
    assert constants.HF_HUB_OFFLINE is True


def test_shards_and_their_index_are_fetched(here: Hub, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "sharded", max_shard_size="100KB")
    here.repositories["org/sharded"] = folder
    found = resolve_model(f"org/sharded@{SHA}")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert shards | {"model.safetensors.index.json"} <= {path.name for path in found.folder.iterdir()}


@pytest.mark.parametrize("spec", ["tiny", "a/b/c", "../tiny", "/no/where", "./no", "org/tiny@", "org/.git", "org/a b"])
def test_what_is_no_hub_id_is_a_folder_that_is_missing(spec: str) -> None:
    assert hub_id(spec) is None
    with pytest.raises(InputError, match="is not a folder"):
        resolve_model(spec)


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path / "org/tiny")
    monkeypatch.chdir(tmp_path)
    found = resolve_model("org/tiny")
    assert (found.folder, found.name, found.revision) == (Path("org/tiny"), "tiny", None)


def test_weights_in_other_forms_are_neither_read_nor_copied(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.fp16.json").write_text("{}")
    index = read_index(model)
    assert [file.name for file in index.files] == ["model.safetensors"]
    copied = copy_small_files(model, tmp_path)
    assert "model.safetensors.index.fp16.json" not in copied
    assert not set(copied) & {Path(name).name for name in OTHER_FORMS}
    assert {"LICENSE", "tokenizer.json"} <= set(copied)


def with_code(folder: Path, **changes: object) -> Path:
    """A checkpoint that claims to bring code of its own."""
    tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": mapped} | changes))
    return folder


def test_code_of_a_checkpoint_runs_only_when_trusted(tmp_path: Path) -> None:
    known, unknown = with_code(tmp_path / "known"), with_code(tmp_path / "unknown", model_type="mine")
    assert not resolve_model(str(known)).runs_code  # transformers has code of its own for it
    with pytest.raises(InputError, match="--trust-remote-code"):
        resolve_model(str(unknown))
    for folder in (known, unknown):
        (warning,) = resolve_model(str(folder), trust_remote_code=True).warnings
        assert folder.name in warning and "executed" in warning
    plain = tiny_llama(tmp_path / "plain")
    assert resolve_model(str(plain), trust_remote_code=True).warnings == []
