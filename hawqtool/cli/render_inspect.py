"""The description of a checkpoint for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hawqtool.cli.render import size
from hawqtool.report.escape import one_line
from hawqtool.report.wording import loads_text, quality_columns, rows_text

_BAR_WIDTH = 40


def print_description(description: dict[str, Any]) -> None:
    """Print a description of schema ``hawqtool.inspect/1``."""
    console = Console(highlight=False)
    if description["kind"] == "gguf":
        _print_gguf(console, description)
        return
    _print_header(console, description)
    if not description["supported"]:
        _print_refused(console, description)
    elif description["kind"] == "original":
        _print_original(console, description)
    else:
        _print_quantized(console, description)


def print_spectrum(found: dict[str, Any]) -> None:
    """Print what `hawqtool.pipeline.spectrum.run_spectrum` returns."""
    console = Console(highlight=False)
    mean, error = found["mean"]
    _line(console, "Hessian", f"{found['num_weights']:,} weights, loss per output on {found['rows']} rows")
    _line(console, "eigenvalues", f"mean {mean:.3e} ± {error:.1e}, mean square {found['mean_square'][0]:.3e}")
    _line(console, "largest", ", ".join(f"{value:.4g}" for value, _ in found["eigenvalues"][:8]) or "none converged")
    _print_loss(console, found["loss"])
    for path in found.get("plots", ()):
        _line(console, "figure", path)


def _print_loss(console: Console, loss: dict[str, Any]) -> None:
    measured = "KL in nats per output" if loss["measure"] == "kl" else "squared error of the embedding"
    _table(
        console,
        f"{measured} at W + a D, D of {' and '.join(loss['formats'])} by {loss['rounding']}",
        ("a", "measured", "standard error", "quadratic prediction", "ratio"),
        (
            (f"{a:g}", f"{value:.4g}", f"{error:.2g}", f"{a**2 * loss['quadratic']:.4g}", _ratio(value, a, loss))
            for a, value, error in zip(loss["scales"], loss["divergence"], loss["stderr"], strict=True)
        ),
        left=0,
    )
    end = loss["breaks_at"]
    text = "within a quarter of it at every a" if end is None else f"first more than a quarter off it at a = {end:g}"
    _line(console, "quadratic", f"½ DᵀFD = {loss['quadratic']:.4g} ± {loss['quadratic_stderr']:.2g}; measured {text}")


def _ratio(value: float, scale: float, loss: dict[str, Any]) -> str:
    predicted = scale**2 * loss["quadratic"]
    return f"{value / predicted:.3f}" if predicted else ""


def _line(console: Console, label: str, text: object) -> None:
    # Names come from files: control characters and markup in them must not reach the terminal.
    console.print(Text(f"{label:<12}{one_line(text, 2000)}"), soft_wrap=True)


def _table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], left: int = 1
) -> None:
    """Columns after the first ``left`` go to the right."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell, 2000)) for cell in row))
    console.print(table)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _print_header(console: Console, description: dict[str, Any]) -> None:
    names = description["architectures"]
    architecture = ", ".join(map(str, names)) if isinstance(names, list) and names else "not stated"
    _line(console, "model", f"{description['model']}: {architecture} (model type {description['model_type']})")
    count = (
        f"{description['parameters']:,} parameters"
        if description["supported"]
        else f"{description['elements']:,} numbers"
    )
    _line(
        console,
        "files",
        f"{description['bytes']:,} bytes ({size(description['bytes'])}) in {description['files']} safetensors "
        f"file{'s' * (description['files'] > 1)}, {description['tensors']:,} tensors, {count}",
    )
    dtypes = [
        f"{name} {entry['elements']:,} numbers in {entry['tensors']:,} tensors"
        for name, entry in description["dtypes"].items()
    ]
    _line(console, "dtypes", "; ".join(dtypes))
    if description.get("source_format"):
        _line(console, "source", f"{description['source_format']}, dequantized on reading")


def _print_refused(console: Console, description: dict[str, Any]) -> None:
    _table(
        console,
        "tensors of two or more dimensions",
        ("name", "dtype", "shape", "count", "numbers", "share"),
        (
            (m["name"], m["dtype"], _shape(m["shape"]), m["count"], f"{m['elements']:,}", _percent(m["share"]))
            for m in description["matrices"]
        ),
    )
    _line(console, "refused", description["refusal"])


def _print_original(console: Console, description: dict[str, Any]) -> None:
    linears = sum(entry["count"] for entry in description["roles"])
    units = sum(entry["count"] for entry in description["units"])
    _line(
        console,
        "structure",
        f"{description['blocks']} blocks, {linears} linears in {units} units, {description['quantizable_weights']:,} "
        "weights to quantize",
    )
    _table(
        console,
        "linears",
        ("role", "shape", "count", "weights", "share", "group sizes that divide it"),
        (
            (
                r["role"],
                _shape(r["shape"]),
                r["count"],
                f"{r['weights']:,}",
                _percent(r["share"]),
                ", ".join(map(str, r["group_sizes"])) or "whole rows only",
            )
            for r in description["roles"]
        ),
    )
    _table(
        console,
        "units (fused by engines, so one format each)",
        ("unit", "members", "count"),
        ((u["unit"], ", ".join(u["members"]), u["count"]) for u in description["units"]),
        left=2,
    )
    for pattern in description["input_groups"]:
        groups = "; ".join(
            " + ".join(group["members"]) + (f" ({group['count']} times)" if group["count"] > 1 else "")
            for group in pattern["groups"]
        )
        _line(console, "inputs", f"{pattern['blocks']} blocks with one input each for: {groups}")
    _table(
        console,
        "size at one format for all linears",
        ("format", "bytes", "of the original", "stored bits per weight", "units in smaller groups"),
        (
            (
                u["format"],
                f"{u['bytes']:,}",
                _percent(u["bytes"] / description["bytes"]),
                f"{u['bpw_linears']:.3f}",
                u["units_in_smaller_groups"] or "",
            )
            for u in description["uniform"]
        ),
    )
    kept = description["unquantized"]
    parts = ", ".join(f"{kind} {count:,}" for kind, count in kept.items()) or "nothing"
    _line(console, "stays", f"{parts} (bytes, {_percent(sum(kept.values()) / description['bytes'])} of the files)")


def _print_quantized(console: Console, description: dict[str, Any]) -> None:
    sizes = description["sizes"]
    _line(
        console,
        "stored",
        f"{sizes['bpw_linears']:.4f} bits per weight over {sizes['quantized_weights']:,} quantized weights, "
        f"{sizes['bpw_file']:.4f} over the whole file; {sizes['unquantized_bytes']:,} bytes are not quantized",
    )
    if description["kv_cache"]:
        _line(console, "KV cache", f"{description['kv_cache']}, by scales in the file")
    for entry in description["bits"]:
        bar = "█" * max(1, round(_BAR_WIDTH * entry["share"]))
        text = (
            f"{bar:<{_BAR_WIDTH}} {_percent(entry['share']):>7}  {entry['linears']} linears, {entry['bytes']:,} bytes"
        )
        console.print(Text(f"{entry['bits']} bit       {text}"), soft_wrap=True)
    _print_roles(console, "plan", description["roles"], "formats")
    _table(
        console,
        "engines",
        ("engine", "version, at least", "loads", "why"),
        ((e["engine"], e["minimum_version"], loads_text(e), e["reason"]) for e in description["engines"]),
        left=4,
    )
    _print_recorded(console, description)


def _print_roles(console: Console, title: str, roles: list[dict[str, Any]], formats: str) -> None:
    """Table of matrices of one role and shape; ``formats`` is the key of how many have which format."""
    _table(
        console,
        title,
        ("role", "shape", "count", "stored bits per weight", formats),
        (
            (
                role["role"],
                _shape(role["shape"]),
                role["count"],
                f"{role['bpw']:.3f}",
                ", ".join(f"{label} x{count}" for label, count in role[formats].items()),
            )
            for role in roles
        ),
    )


def _print_gguf(console: Console, description: dict[str, Any]) -> None:
    name = f" ({description['name']})" if description["name"] else ""
    _line(console, "model", f"{description['model']}: {description['architecture'] or 'not stated'}{name}")
    _line(
        console,
        "file",
        f"{description['bytes']:,} bytes ({size(description['bytes'])}), GGUF version {description['version']}, "
        f"{description['tensors']:,} tensors, {description['elements']:,} numbers",
    )
    matrices = description["bpw_matrices"]
    shown = "no matrices" if matrices is None else f"{matrices:.4f} bits per weight over matrices"
    _line(console, "stored", f"{shown}, {description['bpw_file']:.4f} over the whole file")
    _table(
        console,
        "types",
        ("type", "bits per weight", "tensors", "numbers", "bytes", "share"),
        (
            (
                kind,
                f"{found['bits']:g}",
                found["tensors"],
                f"{found['elements']:,}",
                f"{found['bytes']:,}",
                _percent(found["bytes"] / description["bytes"]),
            )
            for kind, found in description["types"].items()
        ),
    )
    _print_roles(console, "matrices", description["roles"], "types")


def _print_recorded(console: Console, description: dict[str, Any]) -> None:
    recorded = description["recorded"]
    if recorded is None:
        _line(console, "quality", description["recorded_note"])
        return
    evaluation, rows = recorded["evaluation"], recorded["calibration"]
    read = "no data" if rows is None else f"{rows_text(rows)} ({rows['source']})"
    _line(
        console,
        "method",
        f"{recorded['rounding']} by hawqtool {recorded['hawqtool_version']}, {read}, "
        f"seed {recorded['seed']}; shipped {recorded['shipped']}",
    )
    quality = "not evaluated"
    if evaluation is not None:
        shown = quality_columns(evaluation).items()
        quality = ", ".join(f"{name} {show(evaluation['quantized'])}" for name, show in shown)
        quality += " (in-domain)" if recorded["in_domain"] else ""
    _line(console, "quality", quality)
    for text in recorded["warnings"]:
        _line(console, "warning", text)
