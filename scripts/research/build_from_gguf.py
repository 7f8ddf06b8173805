"""Build a transformers folder from a GGUF file: dequantized weights and a tokenizer that splits as the model's own.

    python scripts/research/build_from_gguf.py MODEL.gguf OUT [--tokenizer-only]

transformers reads a Gemma vocabulary as a unigram model. Its scores are no log probabilities but the negated ranks of
merges, as the BPE of sentencepiece keeps them, and so every text falls apart into frequent single characters. Here the
merges are found again from the ranks: of each token, all its splits into two tokens. Needs the packages gguf and
accelerate.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF: written into the text by nobody, and never merged from parts."""
SPACE = "▁"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tokenizer and, unless told otherwise, the weights in bfloat16.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer-only", action="store_true")
    options = parser.parse_args(arguments)
    fields = read_fields(options.file)
    if fields["model"] == "llama":
        tokenizer: Any = sentencepiece_tokenizer(fields)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.file.parent, gguf_file=options.file.name)
    tokenizer.save_pretrained(options.out)
    if not options.tokenizer_only:
        save_weights(options.file, options.out)
    print(options.out)
    return 0


def read_fields(path: Path) -> dict[str, Any]:
    """What the file says of its tokenizer, by the names behind ``tokenizer.ggml.``."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name.rpartition("ggml.")[2]: field.contents() for name, field in fields.items() if "tokenizer.ggml" in name}


def merges_by_rank(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Find the merges of a sentencepiece BPE, first to last.

    Args:
        tokens: The vocabulary, without what is never merged.
        scores: One per token, the higher the earlier it is merged.

    Returns:
        Pairs of tokens whose concatenation is a token, by the score of that, then by their own.
    """
    place = {token: score for token, score in zip(tokens, scores, strict=True)}
    found = []
    for token, score in place.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in place and right in place:
                found.append((-score, -place[left], -place[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def sentencepiece_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer of a Llama or Gemma file, with its byte fallback and its special tokens."""
    tokens, kinds = fields["tokens"], fields["token_type"]
    merged = [(t, s) for t, s, kind in zip(tokens, fields["scores"], kinds, strict=True) if kind == 1]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[fields["unknown_token_id"]]
    merges = merges_by_rank(*zip(*merged, strict=True))
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(SPACE)] if fields.get("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    by_kind = list(zip(tokens, kinds, strict=True))
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token, kind in by_kind if kind == USER_DEFINED])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in by_kind if kind == CONTROL])
    begin, end = fields["bos_token_id"], fields["eos_token_id"]
    if fields.get("add_bos_token", True):
        first = tokens[begin]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{first} $A", f"{first} $A {first} $B", [(first, begin)]
        )
    names = {"bos_token": tokens[begin], "eos_token": tokens[end], "unk_token": unknown}
    if "padding_token_id" in fields:
        names["pad_token"] = tokens[fields["padding_token_id"]]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_weights(file: Path, out: Path) -> None:
    """Dequantize the weights and write them in bfloat16; a model that came from GGUF refuses to be saved itself."""
    quantization = GgufConfig(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=quantization
    )
    config = {name: value for name, value in source.config.to_dict().items() if name != "quantization_config"}
    model = type(source)(type(source.config)(**config))
    model.load_state_dict(source.state_dict())
    model.bfloat16().save_pretrained(out)


if __name__ == "__main__":
    raise SystemExit(main())
