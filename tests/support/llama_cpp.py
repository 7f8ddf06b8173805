"""llama.cpp by its C interface, from the library inside the xllamacpp wheel: logits, quantization, dequantization."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

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
    importance = None if importance is None else importance.contiguous()  # it has to live until the call
    pointer = ctypes.c_void_p(None if importance is None else importance.data_ptr())
    rows, columns = (ctypes.c_int64(extent) for extent in weight.shape)
    source, target = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(stored.data_ptr())
    lib.ggml_quantize_init(kind.number)
    lib.ggml_quantize_chunk(kind.number, source, target, ctypes.c_int64(0), rows, columns, pointer)
    return stored.view(len(weight), -1)


def dequantized(stored: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """What ggml reads from blocks ``[rows, bytes of a row]`` uint8, ``[rows, in]`` float32."""
    lib, stored = ctypes.CDLL(str(library())), stored.contiguous()
    count = stored.numel() // kind.block_bytes * kind.block_size
    values = torch.empty(count, dtype=torch.float32)
    head, _, tail = kind.name.partition("_")
    name = f"{head.lower()}_{tail if tail == 'K' else tail.lower()}"
    read = getattr(lib, f"dequantize_row_{name}")
    read.restype = None
    read(ctypes.c_void_p(stored.data_ptr()), ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(count))
    return values.view(len(stored), -1)


def logits(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits at every token, ``[tokens, vocabulary]`` float32.

    Raises:
        RuntimeError: If llama.cpp refuses the file; with the end of its log.
    """
    with Session(path, len(tokens)) as session:
        session.decode(tokens, 0)
        return torch.stack([session.logits(place) for place in range(len(tokens))])


class Session:
    """A model file loaded into llama.cpp, with room for so many tokens; a context manager.

    Args:
        path: The file.
        room: Tokens.
        threads: Threads of a CPU.
    """

    def __init__(self, path: Path, room: int, threads: int = 1) -> None:
        place = library()
        assert place is not None
        self._lib: Any = ctypes.CDLL(str(place))
        self._path, self._room, self._threads, self._lines = path, max(room, 32), threads, list[str]()

    def __enter__(self) -> Self:
        lib = self._lib
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._log = callback(lambda _, text, __: self._lines.append(text.decode(errors="replace")))
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(lib, name).restype = _Parameters
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
            getattr(lib, name).restype = ctypes.c_void_p
        for name in ("llama_get_logits_ith", "llama_get_memory"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
        self._model = lib.llama_model_load_from_file(str(self._path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError("".join(self._lines[-20:]))
        settings = lib.llama_context_default_params()
        settings.words[0] = settings.words[1] = settings.words[2] = self._room  # context, batch, micro-batch
        lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
        self._context = ctypes.c_void_p(lib.llama_init_from_model(self._model, settings))
        lib.llama_set_n_threads(self._context, ctypes.c_int32(self._threads), ctypes.c_int32(self._threads))
        lib.llama_decode.restype, lib.llama_decode.argtypes = ctypes.c_int32, [ctypes.c_void_p, _Batch]
        vocabulary = ctypes.c_void_p(lib.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        self._width = int(lib.llama_vocab_n_tokens(vocabulary))
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(ctypes.c_void_p(self._model))

    def decode(self, tokens: Sequence[int], first: int) -> None:
        """Run tokens that lie at ``first`` and behind it; outputs are made at all of them."""
        count = len(tokens)
        zero = (ctypes.c_int32 * 1)(0)
        rows = (ctypes.POINTER(ctypes.c_int32) * count)(*[ctypes.cast(zero, ctypes.POINTER(ctypes.c_int32))] * count)
        batch = _Batch(
            count,
            (ctypes.c_int32 * count)(*tokens),
            None,
            (ctypes.c_int32 * count)(*range(first, first + count)),
            (ctypes.c_int32 * count)(*[1] * count),
            rows,
            (ctypes.c_int8 * count)(*[1] * count),
        )
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def logits(self, place: int) -> torch.Tensor:
        """Logits at a token of the last batch, ``[vocabulary]`` float32."""
        found = self._lib.llama_get_logits_ith(self._context, ctypes.c_int32(place))
        values = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * self._width))
        return torch.frombuffer(values.contents, dtype=torch.float32).clone()

    def clear(self) -> None:
        """Forget all tokens."""
        memory = ctypes.c_void_p(self._lib.llama_get_memory(self._context))
        self._lib.llama_memory_clear(memory, ctypes.c_bool(True))
