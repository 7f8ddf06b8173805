"""Fuzz hawqtool's parsers: no error but the documented ones, no hang, no other file touched, memory bounded.

With hypothesis, valid files with mutations; with atheris, where it is installed, bytes that raise the coverage of the
parsers. Every target is fuzzed in a process of its own. The exit code is 1 if something was found.

    python scripts/soak/fuzz.py --inputs 100000
    python scripts/soak/fuzz.py --engine atheris --inputs 20000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS_PER_INPUT = 10.0
MORE_BYTES = 1 << 30


def main() -> int:
    """Fuzz every target, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs, shared by the targets")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--target", help="one target only, in this process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.target:
        engine = fuzz_with_atheris if options.engine == "atheris" else fuzz_with_hypothesis
        engine(options.target, options.inputs, options.seed)
        return 0
    from fuzzing.targets import TARGETS

    failed = []
    for name in TARGETS:
        arguments = ["--engine", options.engine, "--target", name, "--seed", str(options.seed)]
        share = -(-options.inputs // len(TARGETS))
        command = [sys.executable, __file__, *arguments, "--inputs", str(share)]
        failed += [name] if subprocess.run(command, check=False).returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


def fuzz_with_hypothesis(name: str, inputs: int, seed: int, memory: bool = True) -> int:
    """Draw inputs until there are enough; returns how many of them the parser took.

    Args:
        name: Target.
        inputs: How many.
        seed: Of the first batch.
        memory: Whether to bound the memory of this process, which cannot be undone.

    Raises:
        Exception: The failure, its input reduced and printed by hypothesis.
    """
    import hypothesis

    from fuzzing.limits import FileGuard, bound_memory, peak_bytes, watched
    from fuzzing.strategies import STRATEGIES
    from fuzzing.targets import TARGETS, check, empty

    count, taken, begin, slowest = 0, 0, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "input"
        guard = FileGuard(folder)

        @hypothesis.settings(
            max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(STRATEGIES[name])
        def one(content: bytes) -> None:
            nonlocal count, taken, slowest
            count += 1
            start = time.monotonic()
            empty(folder)
            with watched(guard, SECONDS_PER_INPUT):
                taken += check(TARGETS[name], content, folder)
            slowest = max(slowest, time.monotonic() - start)

        if memory:
            bound_memory(MORE_BYTES)
        before = peak_bytes()
        while count < inputs:  # a search that is exhausted early goes on with another seed
            hypothesis.seed(seed)(one)()
            seed += 1
    print(
        f"{name}: {count} inputs, {taken} taken, {count - taken} refused; {time.monotonic() - begin:.0f} s, slowest "
        f"{slowest:.2f} s, memory +{(peak_bytes() - before) >> 20} MiB",
        flush=True,
    )
    return taken


def fuzz_with_atheris(name: str, inputs: int, seed: int) -> None:
    """Mutate bytes under coverage of the parsers; ends the process, with libFuzzer's code on a finding."""
    import atheris

    with atheris.instrument_imports(include=["hawqtool.parsing", "hawqtool.model", "hawqtool.config", "json", "yaml"]):
        from fuzzing.targets import TARGETS, check, empty
    from fuzzing.limits import FileGuard, watched
    from fuzzing.strategies import seeds

    with tempfile.TemporaryDirectory() as scratch:
        folder, corpus = Path(scratch) / "input", Path(scratch) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seeds()[name])
        guard = FileGuard(folder)

        def one(content: bytes) -> None:
            empty(folder)
            with watched(guard, 0):  # libFuzzer keeps the time
                check(TARGETS[name], content, folder)

        limits = [f"-runs={inputs}", f"-seed={seed + 1}", f"-timeout={SECONDS_PER_INPUT:.0f}", "-rss_limit_mb=4096"]
        crashes = Path(tempfile.gettempdir()) / f"hawqtool-fuzz-{name}-"
        arguments = [sys.argv[0], *limits, "-max_len=4096", f"-artifact_prefix={crashes}", "-print_final_stats=1"]
        atheris.Setup([*arguments, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
