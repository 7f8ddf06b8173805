"""llama.cpp by its C interface, from the library inside the xllamacpp wheel: logits, quantization, dequantization."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hawqtool.checkpoint.gguf.block_types import BlockType

_ROOM = 1024
"""Bytes for parameter structures of any version: large structures travel on the stack, where more than is read does
no harm."""


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * (_ROOM // 4))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> Path | None:
    """The shared library; None where xllamacpp is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations)))
    return next(iter(sorted(folder.glob("*.so"), key=lambda path: -path.stat().st_size)), None)


def quantized(weight: torch.Tensor, kind: BlockType, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Blocks that ggml's own quantizer makes of ``[out, in]`` float32, ``[out, bytes of a row]`` uint8."""
    lib, weight = ctypes.CDLL(str(library())), weight.contiguous()
    stored = torch.empty(kind.num_bytes(weight.numel()), dtype=torch.uint8)
    pointer = ctypes.c_void_p(None if importance is None else importance.contiguous().data_ptr())
    rows, columns = (ctypes.c_int64(extent) for extent in weight.shape)
    source, target = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(stored.data_ptr())
    lib.ggml_quantize_init(kind.number)
    lib.ggml_quantize_chunk(kind.number, source, target, ctypes.c_int64(0), rows, columns, pointer)
    return stored.view(len(weight), -1)


def logits(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits at every token, ``[tokens, vocabulary]`` float32.

    Raises:
        RuntimeError: If llama.cpp refuses the file; with the end of its log.
    """
    place = library()
    assert place is not None
    lib, lines = ctypes.CDLL(str(place)), list[str]()
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    log = callback(lambda _, text, __: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(log, None)
    lib.llama_backend_init()
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = _Parameters
    lib.llama_model_load_from_file.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError("".join(lines[-20:]))
    try:
        return _decoded(lib, model, tokens)
    finally:
        lib.llama_model_free.argtypes = [ctypes.c_void_p]
        lib.llama_model_free(model)


def _decoded(lib: Any, model: int, tokens: Sequence[int]) -> torch.Tensor:
    count = len(tokens)
    settings = lib.llama_context_default_params()
    settings.words[0] = settings.words[1] = settings.words[2] = max(count, 32)  # context, batch, micro-batch
    lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
    context = lib.llama_init_from_model(model, settings)
    for name in ("llama_set_n_threads", "llama_decode", "llama_get_logits_ith", "llama_free"):
        getattr(lib, name).restype = None
    lib.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    lib.llama_set_n_threads(context, 1, 1)
    lib.llama_model_get_vocab.restype = lib.llama_get_logits_ith.restype = ctypes.c_void_p
    lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    lib.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    zero = (ctypes.c_int32 * 1)(0)
    rows = (ctypes.POINTER(ctypes.c_int32) * count)(*[ctypes.cast(zero, ctypes.POINTER(ctypes.c_int32))] * count)
    batch = _Batch(
        count,
        (ctypes.c_int32 * count)(*tokens),
        None,
        (ctypes.c_int32 * count)(*range(count)),
        (ctypes.c_int32 * count)(*[1] * count),
        rows,
        (ctypes.c_int8 * count)(*[1] * count),
    )
    lib.llama_decode.restype, lib.llama_decode.argtypes = ctypes.c_int32, [ctypes.c_void_p, _Batch]
    if lib.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    lib.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    found = torch.empty(count, width)
    for place in range(count):
        values = ctypes.cast(lib.llama_get_logits_ith(context, place), ctypes.POINTER(ctypes.c_float * width))
        found[place] = torch.frombuffer(values.contents, dtype=torch.float32)
    lib.llama_free.argtypes = [ctypes.c_void_p]
    lib.llama_free(context)
    return found
