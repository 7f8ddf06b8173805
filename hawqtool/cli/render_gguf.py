"""The record of a GGUF file for people."""

from __future__ import annotations

import shlex
from collections import Counter

from hawqtool.cli.render import search_lines
from hawqtool.parsing import printable
from hawqtool.report.documents import GgufDocument
from hawqtool.report.wording import duration, size


def print_gguf(document: GgufDocument, output: str, model: str) -> None:
    """Print a record of schema ``hawqtool.gguf/1``, and what to do next.

    Args:
        document: The record.
        output: The file as the command line named it.
        model: The original as the command line named it.
    """
    counts = Counter(document["types"].values())
    lines = [
        f"file        {document['output']}: {document['bytes']:,} bytes ({size(document['bytes'])})",
        f"stored      {document['bpw']:.4f} bits per weight over {document['num_weights']:,} weights",
        f"types       {', '.join(f'{name} x{count}' for name, count in sorted(counts.items()))}",
    ]
    if document["kept"]:
        lines.append(f"kept        {len(document['kept'])} matrices as the template has them")
    quality = document["quality"]
    if quality is not None:
        original, found = quality["original"], quality["quantized"]
        if "kl" in found:
            lines.append(f"KL          {found['kl']:.4f} ± {found['kl_stderr']:.4f} nats per token from the original")
        if "perplexity" in found and "perplexity" in original:
            lines.append(f"perplexity  {original['perplexity']:.3f} -> {found['perplexity']:.3f}")
        if "same_top" in found:
            lines.append(f"same top    {100 * found['same_top']:.1f} %")
    lines += search_lines(document["search"])
    path = shlex.quote(output)
    lines += [
        f"done        in {duration(document['seconds'])}; the record is {output}.json",
        f"next        llama-cli -m {path}",
        f"            hawqtool verify {path} --against {shlex.quote(model)}",
    ]
    print("\n".join(map(printable, lines)))
