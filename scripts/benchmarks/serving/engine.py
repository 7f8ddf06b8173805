"""One folder in vLLM, in a process of its own: perplexity, speed, memory of the weights; a line of JSON for each.

``python engine.py SETTINGS`` with a file of JSON (see `serve.py`). It imports nothing but the standard library, torch
and vLLM, so that it runs in the environment of the engine. A step that fails prints its error and its traceback, and
the others go on.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the model can be looked at
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}

_PROMPT, _REPETITIONS, _TOKENS = 64, 2, (5, 250)
_SHARE = 0.02
"""Share of the card that has to be free at the start: the cache has its own size, so that the card may be shared."""
_ATTEMPTS: tuple[dict[str, Any], ...] = (
    {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    {"enforce_eager": True},
)
"""Ways to start the engine, the fastest first: with CUDA graphs of the decoding step, and without."""


def main(path: str) -> int:
    """Load, judge, measure.

    Args:
        path: Settings: ``model``, ``rows`` (lists of tokens; may be empty), ``streams``, ``generated``, ``prefill``
            (tokens of a prompt), ``cache_gib``, ``engine`` (further arguments of vLLM) and ``dummy`` (random weights).
    """
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    start = time.perf_counter()
    engine = _started(settings)
    if engine is None:
        return 1
    say(step="load", seconds=time.perf_counter() - start, **facts())
    done = [attempt("weights", partial(weight_bytes, engine))]
    if settings["rows"]:
        done.append(attempt("perplexity", partial(perplexity, engine, settings["rows"])))
    if settings["prefill"]:
        done.append(attempt("prefill", partial(prefill, engine, settings["prefill"])))
    for streams in settings["streams"]:
        done.append(attempt("decode", partial(decode, engine, streams, settings["generated"])))
    return 0 if all(done) else 1


def say(**record: Any) -> None:
    """Print a line that the driver reads."""
    print(f"RESULT {json.dumps(record)}", flush=True)


def attempt(step: str, work: Callable[[], dict[str, Any]]) -> bool:
    """Whether a step came to its end; what it found, or why not, is said."""
    start = time.perf_counter()
    try:
        say(step=step, **work(), seconds=time.perf_counter() - start)
    except Exception as error:  # whatever an engine raises: the other steps are worth having
        traceback.print_exc()
        say(step=step, error=f"{type(error).__name__}: {str(error)[:300]}")
        return False
    return True


def _started(settings: dict[str, Any]) -> Any:
    """The engine; None where no attempt succeeded."""
    try:
        from vllm import LLM
    except Exception as error:  # its imports raise anything
        traceback.print_exc()
        say(step="import", error=f"{type(error).__name__}: {str(error)[:300]}")
        return None
    longest = max([len(row) for row in settings["rows"]] + [settings["prefill"], _PROMPT + settings["generated"]]) + 8
    streams = max(settings["streams"], default=1)
    shared = {
        "model": settings["model"],
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_seqs": max(streams, 16),
        "max_num_batched_tokens": max(8192, longest),
        "kv_cache_memory_bytes": int(settings["cache_gib"] * (1 << 30)),
        "gpu_memory_utilization": _SHARE,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        **({"load_format": "dummy"} if settings["dummy"] else {}),
        **settings["engine"],
    }
    for number, way in enumerate(_ATTEMPTS):
        sizes = {"cudagraph_capture_sizes": sorted({1, *settings["streams"]})}
        chosen = {name: value | sizes if isinstance(value, dict) else value for name, value in way.items()}
        try:
            engine = LLM(**shared, **chosen)
            say(step="start", way=", ".join(way), attempts=number + 1)
            return engine
        except Exception as error:  # the next way may do
            traceback.print_exc()
            say(step="start", way=", ".join(way), error=f"{type(error).__name__}: {str(error)[:300]}")
    return None


def facts() -> dict[str, Any]:
    """Engine, card and their versions."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "vllm": metadata.version("vllm"),
        "torch": torch.__version__,
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "allocated_bytes": torch.cuda.memory_allocated(),
    }


def weight_bytes(engine: Any) -> dict[str, Any]:
    """Bytes of parameters and buffers of the loaded model, each memory once."""
    return {"weight_bytes": engine.apply_model(_bytes_of)[0]}


def _bytes_of(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def perplexity(engine: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Exp of the mean negative log-probability of every token of a row behind its first."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": list(row)} for row in rows], wanted, use_tqdm=False)
    means = []
    for row, output in zip(rows, outputs, strict=True):
        found = [known[token].logprob for token, known in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        means.append(-sum(found) / len(found))
    nats = sum(means) / len(means)
    return {"perplexity": math.exp(nats), "nats": nats, "rows": len(rows), "seq_len": len(rows[0])}


def _prompts(count: int, length: int) -> list[dict[str, Any]]:
    generator = random.Random(count * 1000 + length)
    return [{"prompt_token_ids": [generator.randrange(*_TOKENS) for _ in range(length)]} for _ in range(count)]


def _seconds(engine: Any, prompts: list[dict[str, Any]], generated: int) -> float:
    """Least seconds of some repetitions behind one that warms up."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=generated, ignore_eos=True, detokenize=False)
    found = []
    for _ in range(_REPETITIONS + 1):
        start = time.perf_counter()
        engine.generate(prompts, wanted, use_tqdm=False)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def prefill(engine: Any, length: int) -> dict[str, Any]:
    """Tokens per second of reading four prompts."""
    prompts = _prompts(4, length)
    return {"tokens_per_second": 4 * length / _seconds(engine, prompts, 1), "prompt": length}


def decode(engine: Any, streams: int, generated: int) -> dict[str, Any]:
    """Tokens per second of so many streams at a time, without the reading of their prompts."""
    prompts = _prompts(streams, _PROMPT)
    more = _seconds(engine, prompts, generated + 1) - _seconds(engine, prompts, 1)
    return {"streams": streams, "tokens_per_second": streams * generated / more, "generated": generated}


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # engines leave threads behind
