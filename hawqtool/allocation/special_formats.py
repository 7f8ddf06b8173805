"""Formats of floats and with rounded inputs: which units can take them, and in which models they load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hawqtool.allocation.uniform import unit_group_size
from hawqtool.checkpoint.fusion import is_expert
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import QuantFormat
from hawqtool.records import Unit

_BFLOAT16 = "torch.bfloat16"

_FOR_EXPERTS = ("fp8", "mxfp4")
"""Formats in which transformers 5.17 loads experts to the bit, by having done it; it drops the divisor of nvfp4, and
fails on blocks and on mxfp8."""


def fits(unit: Unit, quant_format: QuantFormat) -> bool:
    """Whether the groups of a format cover every member of a unit exactly.

    Experts fit no format in which they stay as they are: transformers loads all of them packed, or none.
    """
    if quant_format.is_unquantized and any(is_expert(member.name) for member in unit.members):
        return False
    return all(quant_format.fits(member.out_features, member.in_features) for member in unit.members)


def has_format(config: RunConfig, unit: Unit) -> bool:
    """Whether a unit has a format to take; one that has none stays as it is."""
    if any(fits(unit, fmt) for fmt in config.special_formats if not fmt.is_unquantized):
        return True
    if config.special_formats and not config.given_widths:
        return False
    return unit_group_size(unit, config.base_group_size) is not None


def check_formats(units: Sequence[Unit], stored_dtypes: Mapping[str, object], config: RunConfig) -> None:
    """Check that loaders take the formats of the menu in this model.

    Args:
        units: Units that are quantized.
        stored_dtypes: dtype of the weight of each linear.
        config: The run's configuration.

    Raises:
        UsageError: If one of them does not load, or loads as something else.
    """
    members = [member for unit in units for member in unit.members]
    odd = next((m.name for m in members if str(stored_dtypes[m.name]) != _BFLOAT16), None)
    expert = next((m.name for m in members if is_expert(m.name)), None)
    for fmt in (fmt for fmt in config.special_formats if not fmt.is_unquantized):
        if fmt.floats is not None and fmt.floats.scale != "model" and odd is not None:
            raise UsageError(
                f"--formats {fmt.label} needs a bfloat16 model, {odd} is {str(stored_dtypes[odd])[6:]}: loaders decode "
                "it to bfloat16 and then fail; convert the model, or use fp8, w8ch-a8i or integers"
            )
        if fmt.floats is not None and expert is not None and odd is not None:
            raise UsageError(
                f"--formats {fmt.label} of experts ({expert}) needs a bfloat16 model, {odd} is "
                f"{str(stored_dtypes[odd])[6:]}: transformers decodes them to bfloat16 without a word; convert the "
                "model, use integers, or --ignore them"
            )
        if expert is not None and fmt.label not in _FOR_EXPERTS:
            raise UsageError(
                f"--formats {fmt.label} is not for experts ({expert}): transformers loads it wrongly there or not at "
                f"all, and rounds no inputs of experts; use {', '.join(_FOR_EXPERTS)} or integers, or --ignore them"
            )
