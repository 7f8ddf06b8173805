"""The table of bad inputs: each ends in its exit code and one line on stderr, and leaves nothing behind."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

from hawqtool.cli.app import app
from tests.support.forked import Forks
from tests.support.tiny import tiny_llama

INSTALLED = Path(sys.executable).parent / "hawqtool"
WEIGHTS = "model.safetensors"
ROWS = ("--num-samples", "8", "--seq-len", "16", "--device", "cpu")
TARGET = ("--bits", "4", "--target-bpw", "4.5")
MIXED = ("--bits", "2,4", "--target-bpw", "4")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that nobody may change: a model, one of another shape, a text, scores and a plan."""
    disable_progress_bar()  # the command does so where it is the first to import transformers
    place = tmp_path_factory.mktemp("clean")
    (place / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=1200)))
    tiny_llama(place / "model")
    tiny_llama(place / "other", intermediate_size=64)
    text = ("--calibration", place / "text.txt", "--group-size", "32", *ROWS)
    assert run("measure", place / "other", "-o", place / "other.json", "--bits", "2,4", *text).exit_code == 0
    assert run("measure", place / "model", "-o", place / "s.json", "--bits", "2,4", *text).exit_code == 0
    options = ("--bits", "2,4", "--group-size", "32", "--target-bpw", "4")
    assert run("allocate", place / "s.json", "-o", place / "plan.json", *options).exit_code == 0
    return place


class Place:
    """A working folder with its own copy of the inputs, and tools that spoil them."""

    def __init__(self, folder: Path, clean: Path) -> None:
        self.folder = folder
        shutil.copytree(clean, folder, dirs_exist_ok=True)
        self.model, self.text = folder / "model", folder / "text.txt"

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file."""
        content = json.loads((self.folder / name).read_text())
        change(content)
        (self.folder / name).write_text(json.dumps(content))

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the header of the weights and keep the data."""
        content = (self.model / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (self.model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    def weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change one tensor."""
        tensors = load_file(self.model / WEIGHTS)
        save_file(tensors | {name: change(tensors[name])}, self.model / WEIGHTS, {"format": "pt"})

    def reshape(self, name: str, *shape: int) -> None:
        """Give one tensor another shape."""
        self.weight(name, lambda old: torch.ones(shape, dtype=old.dtype))

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Give one tensor another dtype."""
        self.weight(name, lambda old: old.to(dtype))

    def shard(self, shard: str) -> None:
        """Replace the single file by an index that names one shard."""
        names = dict.fromkeys(load_file(self.model / WEIGHTS), shard)
        (self.model / WEIGHTS).rename(self.folder / WEIGHTS)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    def config(self, text: str) -> None:
        """Write run.yaml."""
        (self.folder / "run.yaml").write_text(text)


@dataclass(frozen=True)
class Case:
    """One row: what is spoilt, which options are given, and how it must end."""

    code: int
    said: str
    options: tuple[object, ...] = TARGET
    spoil: Callable[[Place], object] = field(default=lambda _: None)
    text: bool = True
    model: str = "model"
    group: bool = True


def link(name: str) -> Callable[[Place], object]:
    """Move a file of the model out and leave a link to it."""

    def spoil(place: Place) -> None:
        (place.model / name).rename(place.folder / "elsewhere")
        (place.model / name).symlink_to("../elsewhere")

    return spoil


def sharded_without_metadata(place: Place) -> None:
    """An index as hand-made conversions have it; transformers, which samples, asks for more than the weight map."""
    place.shard("part.safetensors")
    (place.folder / WEIGHTS).rename(place.model / "part.safetensors")


def no_code(place: Place) -> None:
    place.edit("model/config.json", lambda c: c.update(model_type="hitherto_unknown"))


def own_code(place: Place) -> None:
    no_code(place)
    place.edit("model/config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}))


def needs_images(place: Place) -> None:
    config = {"model_type": "blip", "architectures": ["BlipForConditionalGeneration"]}
    (place.model / "config.json").write_text(json.dumps(config))


def quantized(place: Place) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    place.edit("model/config.json", lambda c: c.update(quantization_config=settings))


def overlapping(header: dict[str, Any]) -> None:
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][1] - 2
    header[second]["data_offsets"] = [begin, begin + size]


def without_tokenizer(place: Place) -> None:
    for path in place.model.glob("token*"):
        path.unlink()


def small_vocabulary(place: Place) -> None:
    place.edit("model/config.json", lambda c: c.update(vocab_size=64))
    for name in (EMBEDDING, "lm_head.weight"):
        place.reshape(name, 64, 64)


def in_use(place: Place) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out/mine.txt").write_text("keep")


def write(name: str, content: bytes) -> Callable[[Place], object]:
    return lambda place: (place.folder / name).write_bytes(content)


def nan(name: str, value: float = float("nan")) -> Callable[[Place], object]:
    """Put one value into a tensor."""
    return lambda place: place.weight(
        name, lambda old: old.flatten().index_fill_(0, torch.tensor(3), value).view_as(old)
    )


UP, NORM, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
LAYER_NORM = "model.layers.0.input_layernorm.weight"

CASES: dict[str, Case] = {
    # the checkpoint
    "rows from a model whose index has no metadata": Case(
        4, "to sample rows from it (KeyError: 'metadata')", spoil=sharded_without_metadata, text=False
    ),
    "empty name": Case(2, "model: ", model=""),
    "missing folder": Case(4, "is not a folder", model="./nowhere"),
    "missing GGUF file": Case(4, "none.gguf does not exist; expected a checkpoint", model="./none.gguf"),
    "no config.json": Case(4, "has no config.json", spoil=lambda p: (p.model / "config.json").unlink()),
    "config.json is not JSON": Case(4, "config.json is not", spoil=write("model/config.json", b"{model_type")),
    "config.json is a list": Case(4, "config.json is not", spoil=write("model/config.json", b"[1]")),
    "config.json without model type": Case(4, "model type None", spoil=write("model/config.json", b'{"a": 1}')),
    "no weights": Case(4, "expected safetensors weights", spoil=lambda p: (p.model / WEIGHTS).unlink()),
    "only pickles": Case(
        4, "convert them to safetensors", spoil=lambda p: (p.model / WEIGHTS).rename(p.model / "pytorch_model.bin")
    ),
    "truncated safetensors": Case(
        4, "is truncated", spoil=lambda p: (p.model / WEIGHTS).write_bytes((p.model / WEIGHTS).read_bytes()[:-9])
    ),
    "empty safetensors": Case(4, "has 0 bytes", spoil=write(f"model/{WEIGHTS}", b"")),
    "corrupted header": Case(
        4, "is not JSON", spoil=write(f"model/{WEIGHTS}", struct.pack("<Q", 20) + b"\xff{never a header}" + b"0" * 9)
    ),
    "absurd header size": Case(
        4, "declares a header of", spoil=write(f"model/{WEIGHTS}", struct.pack("<Q", 1 << 62) + b"{}")
    ),
    "overlapping offsets": Case(4, "overlaps the tensor before it", spoil=lambda p: p.header(overlapping)),
    "dtype that is unknown": Case(4, "has dtype F3", spoil=lambda p: p.header(lambda h: h[UP].update(dtype="F3"))),
    "index names a missing shard": Case(4, "which is missing", spoil=lambda p: p.shard("model-1.safetensors")),
    "weights are a link to elsewhere": Case(4, "is a link that leaves the folder", spoil=link(WEIGHTS)),
    "a small file is a link to elsewhere": Case(4, "is a link that leaves the folder", spoil=link("tokenizer.json")),
    "names with terminal escapes": Case(
        4, r"names a tensor \x1b[2J\u202e", spoil=lambda p: p.header(lambda h: h.update({"\x1b[2J\u202e": h.pop(NORM)}))
    ),
    "model type with terminal escapes": Case(
        4, r"\x1b[2J", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(model_type="\x1b[2J"))
    ),
    "header that is nested without end": Case(
        4, "inside each other", spoil=write(f"model/{WEIGHTS}", struct.pack("<Q", 99999) + b"[" * 99999)
    ),
    "config that is nested without end": Case(
        4, "inside each other", spoil=write("model/config.json", b'{"a":' + b"[" * 99999 + b"]" * 99999 + b"}")
    ),
    "config with a million blocks": Case(
        4,
        "num_hidden_layers 1000000",
        spoil=lambda p: p.edit("model/config.json", lambda c: c.update(num_hidden_layers=10**6)),
    ),
    "index leaves the folder": Case(4, "without a path", spoil=lambda p: p.shard(f"../{WEIGHTS}")),
    "a tensor is missing": Case(4, f"{NORM} is not in", spoil=lambda p: p.header(lambda h: h.update(x=h.pop(NORM)))),
    "config and weights disagree": Case(
        4, "config.json implies", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(intermediate_size=96))
    ),
    "NaN in a linear": Case(5, UP, spoil=nan(UP)),
    "NaN in a linear, mixed": Case(5, UP, MIXED, spoil=nan(UP)),
    "Inf in a linear": Case(5, UP, spoil=nan(UP, float("inf"))),
    "NaN in the embedding": Case(5, EMBEDDING, spoil=nan(EMBEDDING)),
    "-Inf in the last norm": Case(5, NORM, spoil=nan(NORM, float("-inf"))),
    "NaN in a block's norm": Case(5, LAYER_NORM, MIXED, spoil=nan(LAYER_NORM)),
    "NaN in a linear, sampled rows": Case(5, UP, spoil=nan(UP), text=False),
    "NaN in the embedding, sampled rows": Case(5, EMBEDDING, spoil=nan(EMBEDDING), text=False),
    "NaN in the last norm, sampled rows": Case(5, NORM, spoil=nan(NORM), text=False),
    "unknown architecture": Case(4, "hitherto_unknown", spoil=no_code),
    "unknown architecture with code": Case(4, "--trust-remote-code", spoil=own_code),
    "images beside texts": Case(4, "needs pixel_values beside a text", spoil=needs_images),
    "quantized already": Case(4, "is quantized already", spoil=quantized),
    "no tokenizer": Case(4, "no tokenizer", spoil=without_tokenizer),
    "broken tokenizer": Case(4, "no tokenizer", spoil=write("model/tokenizer.json", b"{broken")),
    "tokenizer of another kind": Case(4, "no tokenizer", spoil=write("model/tokenizer_config.json", b"[]")),
    "tokenizer of another model": Case(4, "embeds 64 tokens", spoil=small_vocabulary),
    "config of another vocabulary": Case(
        4, "config.json implies", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(vocab_size=64))
    ),
    "config with text for a number": Case(
        4, "expected int", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(hidden_size="64"))
    ),
    "config with heads that do not divide": Case(
        4, "attention heads", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(num_attention_heads=3))
    ),
    "config with an unknown dtype": Case(
        4, "float3", spoil=lambda p: p.edit("model/config.json", lambda c: c.update(dtype="float3"))
    ),
    "norm of another shape": Case(4, f"{NORM} has shape", spoil=lambda p: p.reshape(NORM, 32), text=False),
    "linear stored as integers": Case(4, "stored as I8", spoil=lambda p: p.cast(UP, torch.int8)),
    # texts
    "empty calibration": Case(4, "holds 0 rows", spoil=write("text.txt", b"")),
    "short calibration": Case(4, "holds 2 rows of 16 tokens", spoil=write("text.txt", b"abcd" * 9)),
    "calibration is not UTF-8": Case(4, "is not UTF-8", spoil=write("text.txt", b"abc\xff\xfe")),
    "missing calibration": Case(4, "was not found", spoil=lambda p: p.text.unlink()),
    "repeated calibration": Case(4, "more than one of the", spoil=write("text.txt", b"abcd" * 300)),
    "empty evaluation text": Case(4, "holds 0 rows", (*TARGET, "--eval-data", "empty"), spoil=write("empty", b"")),
    # settings
    "unknown YAML key": Case(
        2, "did you mean 'target_bpw'", ("-c", "run.yaml"), spoil=lambda p: p.config("target_bwp: 4\n")
    ),
    "wrong YAML value": Case(
        2, "rounding", (*TARGET, "-c", "run.yaml"), spoil=lambda p: p.config("rounding: [awq, x]\n")
    ),
    "YAML is no mapping": Case(2, "holds list", ("-c", "run.yaml"), spoil=lambda p: p.config("- target_bpw\n")),
    "YAML is broken": Case(2, "not valid YAML", ("-c", "run.yaml"), spoil=lambda p: p.config("a: [1\nb: {")),
    "YAML with aliases": Case(2, "alias", ("-c", "run.yaml"), spoil=lambda p: p.config("a: &a [x]\nb: [*a, *a]\n")),
    "YAML that is too large": Case(2, "256,000", ("-c", "run.yaml"), spoil=lambda p: p.config("#" * 300_000)),
    "YAML with a key twice": Case(2, "twice", ("-c", "run.yaml"), spoil=lambda p: p.config("seed: 1\nseed: 2\n")),
    "YAML is missing": Case(2, "was not found", ("-c", "none.yaml")),
    "two size targets": Case(2, "exactly one of", ("--target-bpw", "4", "--target-size", "1MB")),
    "no target": Case(2, "exactly one of", ()),
    "infeasible target": Case(2, "3.500 to 4.500", ("--bits", "3,4", "--target-bpw", "2")),
    "group size that divides nothing": Case(
        2,
        "divides",
        (*TARGET, "--group-size", "64"),
        spoil=lambda p: tiny_llama(p.model, hidden_size=40, intermediate_size=72, head_dim=10),
        group=False,
    ),
    "pin that matches nothing": Case(2, "matches none", (*TARGET, "--pin", "re:.*nothing=8")),
    "malformed pin": Case(2, "NAME=WIDTH", (*TARGET, "--pin", "re:.*down_proj")),
    "pin with a broken pattern": Case(2, "re:(", (*TARGET, "--pin", "re:(=8")),
    "pin with an endless pattern": Case(2, "not a valid regular", (*TARGET, "--pin", "re:a{99999999999999}=8")),
    "conflicting pins": Case(2, "qkv_proj", (*MIXED, "--pin", "re:.*q_proj=4", "--pin", "re:.*k_proj=2")),
    "everything ignored": Case(2, "--ignore", (*TARGET, "--ignore", "re:.*")),
    "no CUDA device": Case(2, "no CUDA device", (*TARGET, "--device", "cuda")),
    "target of a number without end": Case(2, "less than or equal to 64", ("--target-bpw", "1e308")),
    "target above the original": Case(2, "no less than the original's 16", ("--target-bpw", "16")),
    "target above the original, dry": Case(2, "the original's 16", ("--target-bpw", "35", "--dry-run")),
    "pin of thousands of digits": Case(2, "NAME=WIDTH", (*TARGET, "--pin", "re:.*=" + "9" * 5000)),
    "calibration of thousands of characters": Case(
        2, "is no path to use", (*TARGET, "--calibration", "/" + "a" * 5000)
    ),
    "missing calibration, dry": Case(4, "was not found", (*TARGET, "--dry-run"), spoil=lambda p: p.text.unlink()),
    "missing evaluation text, dry": Case(4, "was not found", (*TARGET, "--eval-data", "none.txt", "--dry-run")),
    "short calibration, dry": Case(
        4, "holds 2 rows of 16 tokens", (*TARGET, "--dry-run"), spoil=write("text.txt", b"abcd" * 9)
    ),
    "key heads that do not divide": Case(
        4,
        "block 0 cannot be run",
        spoil=lambda p: p.edit("model/config.json", lambda c: c.update(num_key_value_heads=3)),
    ),
    "no tokenizer, dry": Case(4, "no tokenizer", (*TARGET, "--dry-run"), spoil=without_tokenizer, text=False),
    "missing task, dry": Case(4, "no JSON-lines file here", (*TARGET, "--tasks", "none.jsonl", "--dry-run")),
    "word in other letters": Case(2, "did you mean 'vllm'?", (*TARGET, "--profile", "vLLM")),
    # output
    "output not empty, dry": Case(2, "not empty", (*TARGET, "--dry-run"), spoil=in_use),
    "output is the root": Case(2, "is a mount point", (*TARGET, "-o", "/")),
    "output is named as GGUF files are": Case(2, "add --to gguf, or name a folder", (*TARGET, "-o", "out.gguf")),
    "output with a null": Case(2, "null character", (*TARGET, "-o", "a\0b")),
    "output not empty": Case(2, "not empty", spoil=in_use),
    "overwrite of another's folder": Case(2, "not made by hawqtool", (*TARGET, "--overwrite"), spoil=in_use),
    "parent of the output missing": Case(2, "does not exist", (*TARGET, "-o", "none/out")),
    # files between the stages
    "scores of another model": Case(2, "another checkpoint", (*MIXED, "--sensitivity", "other.json")),
    "scores that are none, dry": Case(
        4, "has schema 'hawqtool.plan", (*MIXED, "--sensitivity", "plan.json", "--dry-run")
    ),
    "scores that are damaged": Case(
        4,
        "is damaged",
        (*MIXED, "--sensitivity", "s.json"),
        spoil=lambda p: p.edit("s.json", lambda s: s.pop("scores")),
    ),
    "scores without the metric": Case(
        4,
        "has no scores of projection",
        (*MIXED, "--sensitivity", "s.json"),
        spoil=lambda p: p.edit("s.json", lambda s: s["scores"].pop("projection")),
    ),
    "scores of other units": Case(
        2,
        "s.json has no scores of model.layers.0.self_attn.q_proj; expected those of the units of this run",
        (*MIXED, "--sensitivity", "s.json", "--profile", "transformers"),
    ),
    "scores that are no numbers": Case(
        4,
        "is damaged",
        (*MIXED, "--sensitivity", "s.json"),
        spoil=lambda p: p.edit(
            "s.json", lambda s: next(iter(s["scores"]["projection"].values())).update(w2g32=["a", 0])
        ),
    ),
    "plan with unknown layers": Case(
        2,
        "unknown or ignored layer model.layers.9",
        ("--plan", "plan.json"),
        spoil=lambda p: p.edit(
            "plan.json", lambda d: d["layers"].append(d["layers"][0] | {"name": "model.layers.9.mlp.up_proj"})
        ),
    ),
    "plan with a layer twice": Case(
        4,
        "has a layer twice",
        ("--plan", "plan.json"),
        spoil=lambda p: p.edit("plan.json", lambda d: d["layers"].append(d["layers"][0])),
    ),
    "plan with a fraction of bits": Case(
        4,
        "bits 4.5",
        ("--plan", "plan.json"),
        spoil=lambda p: p.edit("plan.json", lambda d: d["layers"][0].update(bits=4.5)),
    ),
    "plan of another schema": Case(4, "hawqtool.plan/1", ("--plan", "s.json")),
    "plan that is missing": Case(4, "was not found", ("--plan", "none.json")),
}
THROUGH_THE_COMMAND = ("two size targets", "missing folder")
IN_A_PROCESS = "NaN in the embedding, sampled rows"


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Outcome:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run_installed(*arguments: object) -> Outcome:
    command = [str(INSTALLED), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def place(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    yield Place(tmp_path, clean)


def check(place: Place, case: Case, call: Callable[..., Outcome]) -> None:
    case.spoil(place)
    before = sorted(place.folder.rglob("*"))
    output = () if "-o" in case.options else ("-o", "out")
    group = ("--group-size", "32") if case.group else ()
    text = ("--calibration", place.text) if case.text else ()
    rows = (*ROWS, "--eval-samples", "4", *group, *text)
    result = call("quantize", case.model, "--quiet", *output, *rows, *case.options)
    assert result.exit_code == case.code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert case.said in result.stderr
    assert sorted(place.folder.rglob("*")) == before


@pytest.mark.parametrize("name", CASES)
def test_bad_input(place: Place, name: str) -> None:
    if name == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    check(place, CASES[name], run)


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_bad_input_through_the_installed_command(place: Place, name: str) -> None:
    check(place, CASES[name], run_installed)


def test_bad_input_in_a_process_of_its_own(place: Place, forks: Forks) -> None:
    def run_fork(*arguments: object) -> Outcome:
        done = forks.run(*arguments)
        return Outcome(done.returncode, done.stdout, done.stderr)

    check(place, CASES[IN_A_PROCESS], run_fork)
