"""The run configuration: defaults < preset < YAML file < command line, strict at every step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, model_validator

from hawqtool.errors import UsageError
from hawqtool.formats import (
    ASYMMETRIC_PROFILES,
    CHANNEL,
    GROUP_SIZES,
    QuantFormat,
    asymmetric_refusal,
    group_size_refusal,
    is_served,
    names_width,
    parse_label,
)
from hawqtool.parsing import read_yaml, shown
from hawqtool.presets import find_preset
from hawqtool.records import EXTRA_METRICS, SCORE_METRICS, SWEEP_METRICS
from hawqtool.settings.fields import SELF
from hawqtool.settings.metadata import Affects, Setting, choices, flag_of, settings_of
from hawqtool.settings.targets import NEED_EVALUATION
from hawqtool.settings.value_rules import CheckedFields, check_special_formats
from hawqtool.values import split_weight

DEFAULT_GROUP_SIZE = 128
"""Group size of one width alone, and of pins, where none is given."""

DEFAULT, PRESET, FILE, FLAG = "default", "preset", "file", "flag"
"""Where the value of a setting comes from; a later one wins."""


_GGUF_ALONE = ("template", "tensor_types", "imatrix", "block_types", "embedding_type")
"""Settings that say something of GGUF files alone."""

_WITH_GGUF = {
    *("model", "output", "to", *_GGUF_ALONE, "target_bpw", "target_size", "target_kl", "restart", "ignore"),
    *("calibration", "sampled_share", "num_samples", "seq_len", "eval_data", "eval_samples", "eval", "sensitivity"),
    *("quantize_lm_head", "rounding", "target_shift", "token_importance", "damping", "solver"),
    *("device", "batch_size", "max_memory", "seed", "trust_remote_code"),
}
"""Settings that GGUF files take; all others must be left alone."""


class RunConfig(CheckedFields):
    """Every setting of a run, checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.profile == "portable" and not set(self.given_widths or ()) <= {4, 8}:
            raise ValueError(
                "profile portable allows widths 4 and 8 only; drop the others from bits or choose another profile"
            )
        for size in (size for size in self.group_sizes if not is_served(size)):
            if self.profile != "transformers":
                raise ValueError(group_size_refusal(size))
        if self.profile == "portable" and self.scale_sign == "both":
            raise ValueError("profile portable needs positive scales; drop scale_sign or choose another profile")
        for other in (n for n in ("target_kl", "max_cost", "max_active", "plan") if getattr(self, n) is not None):
            # Alternatives and swaps keep to a budget of bytes and know of nothing else.
            if self.swaps or (self.shortlist or 1) > 1:
                raise ValueError(f"shortlist and swaps work under target_bpw or target_size alone, found {other} too")
        if self.embedding_bits not in (None, 8, 16):
            raise ValueError(f"embedding_bits is 8 or 16, found {self.embedding_bits}; give one of them")
        if self.embedding_bits == 8 and self.profile != "transformers":
            raise ValueError("embedding_bits 8 loads in transformers alone; give profile transformers too, or drop it")
        if self.proof == "layerwise" and (self.swaps or self.target_kl is not None):
            raise ValueError("proof layerwise measures no plan as it is rounded, as swaps and target_kl do; use full")
        if self.measurements is not None and not self.measures:
            raise ValueError("measurements are shared where something is measured; drop it, or plan or the saved file")
        if not self.symmetric and self.profile not in ASYMMETRIC_PROFILES:
            raise ValueError(asymmetric_refusal(self.profile))
        if not self.symmetric and self.scale_sign == "both":
            raise ValueError("scale_sign both is for symmetric grids: zero points do its work; drop one of the two")
        if self.rounding == "rtn" and (self.target_shift or self.scale_refit):
            raise ValueError("target_shift and scale_refit belong to compensated rounding; drop them or rounding rtn")
        if self.foem_form == "paper" and self.foem_beta == 1:
            raise ValueError("foem_form paper needs foem_beta below 1, found 1; lower it, or use rounding rtn")
        if self.gram_steps and self.rounding in ("rtn", "gptaq"):
            raise ValueError(f"gram_steps need rounding gptq or foem, found {self.rounding}; drop one of the two")
        fed = self.output_feedback not in (None, "off")
        if fed and (self.rounding in ("rtn", "gptaq") or self.token_importance == "none"):
            raise ValueError("output_feedback needs rounding gptq or foem, and token_importance; drop one of the two")
        if self.rounding == "gptaq" and self.target_shift:
            raise ValueError("rounding gptaq and target_shift make the same correction twice; drop one of the two")
        if (self.costs is None) != (self.max_cost is None):
            raise ValueError("costs and max_cost are needed together, only one of them was found; add the other")
        if self.has_second_budget and self.solver == "hull":
            raise ValueError("solver hull knows one budget only; max_cost and max_active need solver exact or auto")
        if self.costs is not None and self.max_active is not None:
            raise ValueError("max_active and costs are both a second budget; drop one of the two")
        if (self.baseline is None) != (self.max_regression is None):
            raise ValueError("baseline and max_regression are needed together, only one was found; add the other")
        if (self.refine_steps or self.sensitivity_steps) and self._chooses_roundings:
            raise ValueError("refine_steps and sensitivity_steps need a rounding without gptaq, scale_refit and auto")
        if (self.learns or self.sensitivity_steps) and self.num_samples == 1:
            raise ValueError("steps that learn hold calibration rows out and need at least 2; raise num_samples")
        if self.refine_learner != "adam" and not self.refine_steps:
            raise ValueError("refine_learner says how refine_steps learn, found none of them; add refine_steps")
        if self.refine_error and not self.refine_steps:
            raise ValueError("refine_error says what refine_steps lower, found none of them; add refine_steps")
        if self.refine_error == "loss" and (self.rounding == "rtn" or self.token_importance == "none"):
            raise ValueError("refine_error loss needs token_importance, and a rounding but rtn; drop one of the two")
        if self.distill_codes and not self.distill_steps:
            raise ValueError("distill_codes says what distill_steps learn, found none of them; add distill_steps")
        if self.has_second_budget and self.plan is not None:
            raise ValueError("a plan is carried out as it is; drop plan, or costs with max_cost, or max_active")
        return self

    @model_validator(mode="after")
    def _check_gguf(self) -> RunConfig:
        if self.to != "gguf":
            for name in (n for n in _GGUF_ALONE if getattr(self, n) != RunConfig.model_fields[n].default):
                raise ValueError(f"{name} is for GGUF files; drop it, or give --to gguf")
            return self
        if self.template is None:
            raise ValueError(
                "to gguf needs a template, which has metadata and tokenizer: run llama.cpp's python "
                "convert_hf_to_gguf.py MODEL --outtype bf16 --outfile MODEL-bf16.gguf, then hawqtool quantize MODEL "
                "--to gguf --template MODEL-bf16.gguf with your other options"
            )
        for name, field in RunConfig.model_fields.items():
            if name not in _WITH_GGUF and getattr(self, name) != field.default:
                instead = "drop it" if name not in ("bits", "group_size", "formats") else "give --block-types instead"
                raise ValueError(f"{flag_of(name)} has no effect on GGUF files yet; {instead}, or drop --to gguf")
        if self.rounding not in ("rtn", "gptq") or self.target_shift == "auto":
            raise ValueError("to gguf rounds by rtn or gptq, with target_shift off or a number; drop other choices")
        if not self.measures or self.metric in EXTRA_METRICS:
            raise ValueError(f"to gguf chooses by {', '.join(SWEEP_METRICS)}, found sensitivity {self.sensitivity}")
        targets = [n for n in ("target_bpw", "target_size", "target_kl") if getattr(self, n) is not None]
        if len(targets) > 1:
            raise ValueError(f"{targets[0]} and {targets[1]} are both given; drop one of the two")
        return self

    @model_validator(mode="after")
    def _check_formats(self) -> RunConfig:
        if self.formats is None:
            return self
        check_special_formats(self, [fmt.label for fmt in self.special_formats])
        for other in (n for n in ("bits", "group_size", "extra_group_sizes") if getattr(self, n) not in (None, ())):
            raise ValueError(f"formats is the whole menu, found {other} too; drop one of the two")
        wrong = next((fmt.label for fmt in self._full_formats if fmt.symmetric != self.symmetric), None)
        if wrong is not None:
            kind, flag = ("has", "--asymmetric") if self.symmetric else ("has no", "--symmetric")
            raise ValueError(f"{wrong} in formats {kind} zero points; give {flag}, or another label")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> RunConfig:
        if self.eval is False:
            given = (n for n in (*NEED_EVALUATION, "eval_data", "eval_samples") if getattr(self, n) is not None)
            for other in given:
                raise ValueError(f"{other} needs the evaluation that --no-eval leaves out; drop one of the two")
            if self.swaps or (self.shortlist or 1) > 1:
                raise ValueError("shortlist and swaps compare plans by evaluation; drop them, or --no-eval")
        return self

    @property
    def learns(self) -> bool:
        """Whether steps are learned after rounding, for which calibration rows are held out."""
        return bool(self.refine_steps or self.distill_steps)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes that a plan may have; layers that one does not divide fall to a smaller one."""
        if self.formats is not None:
            whole = any(map(names_width, self.formats))
            named = [fmt.group_size for fmt in self._full_formats if fmt.is_plain] or [CHANNEL]
            return tuple(dict.fromkeys((*named, *GROUP_SIZES, CHANNEL) if whole else named))
        return (*GROUP_SIZES, CHANNEL) if self.chooses_groups else (self.base_group_size, *self.extra_group_sizes)

    @property
    def base_group_size(self) -> int:
        """The group size of one width alone, of pins, and which layers must be divided by to be quantized."""
        if self.formats is not None:
            return max(self.group_sizes) if CHANNEL not in self.group_sizes else CHANNEL
        return DEFAULT_GROUP_SIZE if self.group_size is None else self.group_size

    @property
    def chooses_groups(self) -> bool:
        """Whether plans may have every group size that engines load: where nothing is said of them."""
        return self.group_size is None and not self.extra_group_sizes and self.formats is None

    @property
    def given_widths(self) -> tuple[int, ...] | None:
        """Widths of integers that were asked for; None where the run decides."""
        plain = set(self.formats or ()) - {fmt.label for fmt in self.special_formats}
        return self.bits if self.formats is None else tuple(sorted({int(label[1]) for label in plain}))

    @property
    def _full_formats(self) -> tuple[QuantFormat, ...]:
        """Formats that are named with their groups."""
        return tuple(parse_label(label) for label in self.formats or () if not names_width(label))

    @property
    def special_formats(self) -> tuple[QuantFormat, ...]:
        """Formats of floats, and with rounded inputs, of the menu."""
        return tuple(fmt for fmt in self._full_formats if not fmt.is_plain)

    @property
    def uniform_format(self) -> QuantFormat | None:
        """The format of all units where one label is the whole menu and there is no target; None otherwise."""
        alone = self.formats is not None and len(self.formats) == len(self._full_formats) == 1
        return self._full_formats[0] if alone and not self._has_target else None

    @property
    def is_uniform(self) -> bool:
        """Whether one width or format is asked for and nothing else."""
        return self.uniform_width is not None or self.uniform_format is not None

    @property
    def _has_target(self) -> bool:
        return any(getattr(self, name) is not None for name in names_affecting(Affects.TARGET))

    @property
    def has_second_budget(self) -> bool:
        """Whether plans have to keep to a second budget beside that of their stored bytes."""
        return self.max_cost is not None or self.max_active is not None

    @property
    def both_signs(self) -> bool:
        """Whether scales may be negative; some kernels of the portable profile take an unsigned maximum."""
        return self.scale_sign == "both" or (self.scale_sign == "auto" and self.profile != "portable")

    @property
    def calibration_weights(self) -> dict[str, float]:
        """Calibration sources in order, with their weights."""
        return dict(map(split_weight, self.calibration))

    @property
    def data_sources(self) -> tuple[str, ...]:
        """Every source of text: calibration (rows of the model itself aside), selection and evaluation."""
        named = dict.fromkeys((*self.calibration_weights, *self.selection_data, self.eval_data))
        return tuple(source for source in named if source not in (None, SELF))

    @property
    def _chooses_roundings(self) -> bool:
        """Whether rounding has held-out rows of its own, or is GPTAQ's."""
        automatic = self.target_shift == "auto" or (self.rounding == "foem" and self.foem_beta == "auto")
        return automatic or self.rounding == "gptaq" or self.scale_refit

    @property
    def uniform_width(self) -> int | None:
        """The width of all units where one is asked for and nothing else; None where a target says what to do."""
        if self.bits is None or len(self.bits) > 1 or self.extra_group_sizes:
            return None
        return None if self._has_target else self.bits[0]

    @property
    def chooses(self) -> bool:
        """Whether selection rows decide what is shipped: between several plans, or where a quality target is met."""
        one = self.given_widths is not None and len(self.given_widths) == len(self.group_sizes) == 1
        one = len(self.special_formats) == 1 and not self.given_widths if self.special_formats else one
        return self.plan is None and not self.is_uniform and self.evaluates and not one and self.to != "gguf"

    @property
    def evaluates(self) -> bool:
        """Whether the result is judged on held-out rows; by default not where neither work nor settings name data."""
        if self.eval is not None:
            return self.eval
        names = (*names_affecting(Affects.ROWS), *NEED_EVALUATION)
        asked = any(getattr(self, name) != RunConfig.model_fields[name].default for name in names)
        return asked or not self.is_uniform or not self.rounds_without_rows

    @property
    def reads_rows(self) -> bool:
        """Whether rows of text or images are needed."""
        return self.evaluates or not self.rounds_without_rows

    @property
    def rounds_without_rows(self) -> bool:
        """Whether each weight may be rounded to nearest by itself."""
        calibrates = any(fmt.has_input_divisor for fmt in self.special_formats) or self.kv_cache != "none"
        fixed = (self.plan is not None or self.is_uniform) and not calibrates
        return fixed and self.rounding == "rtn" and self.calibration == (SELF,) and not self.learns

    def require_one_target(self) -> None:
        """Check that exactly one of target_bpw, target_size, target_kl and plan is given, or one width alone.

        Raises:
            UsageError: Otherwise.
        """
        targets = names_affecting(Affects.TARGET)
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) != 1 and not self.is_uniform:
            *first, last = map(flag_of, targets)
            found = " and ".join(map(flag_of, given)) or "none"
            raise UsageError(f"exactly one of {', '.join(first)} and {last} (or --bits 4) is needed, found {found}")

    @property
    def measures(self) -> bool:
        """Whether scores are measured where a unit has a choice, not read from a file or made needless by a plan."""
        return self.plan is None and self.sensitivity in ("auto", *SCORE_METRICS)

    @property
    def measured_extras(self) -> tuple[str, ...]:
        """Metrics to measure beside those of every measurement: those asked for, and the one that allocation uses."""
        return tuple(m for m in EXTRA_METRICS if m in self.extra_metrics or m == self.sensitivity)

    @property
    def metric(self) -> str:
        """Metric that allocation uses; ``auto`` is fisher for plain rounding, projection for compensated rounding.

        Errors of plain rounding are independent, which fisher takes them to be; those of compensated rounding are not,
        and of the scores that one sweep gives, projection follows the measured divergence best.
        """
        if self.sensitivity in SCORE_METRICS:
            return self.sensitivity
        return "fisher" if self.rounding == "rtn" else "projection"


SETTINGS: Mapping[str, Setting] = settings_of(RunConfig)
"""What each setting says of itself, by name."""


def names_affecting(*affected: Affects) -> tuple[str, ...]:
    """Names of the settings that change one of these, in the order of the fields."""
    return tuple(name for name, setting in SETTINGS.items() if setting.affects in affected)


def load_config(path: Path | None, flags: Mapping[str, Any], preset: str | None = None) -> RunConfig:
    """Merge a preset, a YAML file and the flags that were given; a later one wins.

    Args:
        path: A YAML file; a name without a folder and without ``.yaml`` is that of a preset.
        flags: Values by name; None and the empty tuple say nothing.
        preset: Name of a preset.

    Raises:
        UsageError: Naming every problem at once, unknown keys with the nearest valid one.
    """
    given = {k: v for k, v in flags.items() if v is not None and v != ()}
    values, _ = merge_sources(path, given, preset)
    origin = f" in {path}" if path else ""
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise UsageError("; ".join(describe_problem(e, origin) for e in error.errors())) from error


def merge_sources(
    path: Path | None, given: Mapping[str, Any], preset: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by name, unchecked, and where each comes from; the target of a preset gives way to any other target."""
    presets, file = preset_and_file(path, preset)
    from_presets: dict[str, Any] = {}
    for name in presets:
        from_presets |= read_yaml(find_preset(name))
    sources = {PRESET: from_presets, FILE: read_yaml(file) if file is not None else {}, FLAG: dict(given)}
    targets = names_affecting(Affects.TARGET)
    if any((sources[FILE] | sources[FLAG]).get(name) is not None for name in targets):
        sources[PRESET] = {name: value for name, value in sources[PRESET].items() if name not in targets}
    if (sources[FILE] | sources[FLAG]).get("formats") is not None:  # a whole menu gives no room to a preset's
        menu = ("bits", "group_size", "extra_group_sizes")
        sources[PRESET] = {name: value for name, value in sources[PRESET].items() if name not in menu}
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, found in sources.items():
        values |= found
        origin |= dict.fromkeys(found, source)
    return values, origin


def preset_and_file(path: Path | None, preset: str | None) -> tuple[tuple[str, ...], Path | None]:
    """Presets of ``--preset`` and ``-c`` in the order in which they apply, and the file of ``-c``.

    A name without a folder and without ``.yaml`` is that of a preset, also where a file has it.
    """
    presets = () if preset is None else (preset,)
    if path is not None and path.parent == Path() and path.suffix not in (".yaml", ".yml"):
        return (*presets, path.name), None
    return presets, path


def describe_problem(error: Any, origin: str) -> str:
    """One of the errors of a ValidationError in words, with ``origin`` (such as `` in run.yaml``) after the key."""
    key = ".".join(map(str, error["loc"])) or "configuration"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, RunConfig.model_fields, n=1)
        return f"unknown key {key!r}{origin}" + (f", did you mean {near[0]!r}?" if near else "")
    none = error["type"] == "missing"
    message = "expected a folder or a hub id, found none" if none else str(error["msg"]).removeprefix("Value error, ")
    value = "" if none or not error["loc"] else f", found {shown(error['input'])}{_nearest(key, error['input'])}"
    return f"{key}{origin}: {message[0].lower()}{message[1:]}{value}"


def _nearest(name: str, value: object) -> str:
    """What was meant by a value that is close to one of the words that a setting takes."""
    words = choices(RunConfig.model_fields[name]) if name in RunConfig.model_fields else ()
    near = difflib.get_close_matches(value.lower(), words, n=1) if isinstance(value, str) else []
    return f", did you mean {near[0]!r}?" if near else ""
