"""Learn codes and scales of rounded layers from the Gram matrix of their inputs alone: no rows, no forward passes.

The loss tr(E H Eᵀ), E = Q - goal, has the gradient 2 E H, one product a step. Compensated rounding goes over the
columns once; annealed codes (see `hawqtool.rounding.learned.gumbel`) and coordinate descent may take back what it did.
GSQ (arXiv 2604.18556) learns its query and key projections so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hawqtool.records import RoundedLayer
from hawqtool.rounding.factor import Factor, factorize
from hawqtool.rounding.gram import quadratic_form
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.rounding.layer import quantized, with_codes
from hawqtool.rounding.learned.coordinate_descent import descend
from hawqtool.rounding.learned.fake_quant import by_kind
from hawqtool.rounding.learned.gumbel import GumbelLayers, SignMomentum, logit_rate, scale_rate
from hawqtool.rounding.learned.training import CHECKS
from hawqtool.rounding.method import LayerSettings, RoundingMethod, Task
from hawqtool.rounding.spec import InitialRounding
from hawqtool.rounding.statistics import GroupStatistics
from hawqtool.rounding.two_pass import prepare, refit, round_targets, with_grids
from hawqtool.runtime.stage_timer import UNRECORDED

REACH = 1
"""How far codes may move in annealing: by two they hardly ever do, for two thirds more memory and time."""

TRIAL_ROWS = 256
"""Rows of a weight, at least, that are learned from a part of the tokens to see whether the others gain by it."""


@dataclass(frozen=True)
class GramSchedule:
    """How long codes are annealed, and the seed of the noise."""

    steps: int
    seed: int = 0


@dataclass(frozen=True)
class Stop:
    """Where learning was best on held-out tokens.

    Args:
        check: Number of the check whose codes were best; 0 is the start.
        descended: Whether coordinate descent from there was better still.
        gain: Share of the held-out error that is gone.
    """

    check: int = 0
    descended: bool = False
    gain: float = 0.0


def learn_group(
    tasks: Sequence[Task],
    layers: Sequence[RoundedLayer],
    statistics: GroupStatistics,
    factor: Factor,
    method: RoundingMethod,
    schedule: GramSchedule,
) -> list[RoundedLayer]:
    """The layers of an input group with the codes and scales that learning from their Gram matrix gives.

    How far that goes is chosen on held-out tokens: a part of the rows of each weight is rounded and learned without
    these. A start that has seen them cannot be compared with what is learned without them (at ten tokens a column
    each layer looked worse, by 20 %, that gained 5). All rows then learn from all tokens. Layers that gain nothing
    stay as they are, as do those with output feedback, whose rows lower another loss, and all where no token is held
    out.

    Args:
        tasks: The layers before rounding, each in one format.
        layers: What `round_layers` gave.
        statistics: Moments of their inputs, with those of the held-out tokens.
        factor: Factor of their Gram matrix.
        method: Method that rounded them.
        schedule: Steps and seed.
    """
    alone = [(t, layer) for t, layer in zip(tasks, layers, strict=True) if not layer.metrics.feedback_blocks]
    fitting, held_out = statistics.fitting, statistics.held_out
    if fitting is None or held_out is None or not alone:
        return list(layers)
    chosen, settings = [task for task, _ in alone], [_settings(layer) for _, layer in alone]
    stops = choose_stops(*_trial(chosen, settings, fitting, factor.damping, method), held_out.gram, schedule)
    goals = prepare(chosen, factor, method, statistics, settings, UNRECORDED).goals
    initial = [
        InitialRounding(layer.name, goal, quantized(layer), layer.quant_format)
        for (_, layer), goal in zip(alone, goals, strict=True)
        if stops[layer.name].gain > 0
    ]
    found = learn(initial, _damped(statistics.gram, factor), schedule, stops)
    weights = {task.name: task.weight for task in chosen}
    return [
        _relearned(layer, found.get(layer.name), weights[layer.name], statistics.gram, stops[layer.name].gain)
        if layer.name in stops
        else layer
        for layer in layers
    ]


def _settings(layer: RoundedLayer) -> LayerSettings:
    found = layer.metrics
    return LayerSettings(found.beta, found.target_shift, found.scales_refitted)


def _damped(gram: Tensor, factor: Factor) -> Tensor:
    damped = gram.clone()
    damped.diagonal().copy_(factor.diagonal)
    return damped


def _trial(
    tasks: Sequence[Task],
    settings: Sequence[LayerSettings],
    fitting: GroupStatistics,
    damping: float,
    method: RoundingMethod,
) -> tuple[list[InitialRounding], Tensor]:
    """Some rows of each weight rounded for a part of the tokens, with their goals, and the damped Gram matrix."""
    factor = factorize(fitting.gram, fitting.num_tokens, damping, name=tasks[0].name)
    some = [replace(t, weight=t.weight[:: max(1, len(t.weight) // TRIAL_ROWS)].contiguous()) for t in tasks]
    (problem,) = with_grids([prepare(some, factor, method, fitting, settings, UNRECORDED)])
    results = round_targets(problem, [s.beta for s in settings])
    if any(s.refit for s in settings):
        again = refit(problem, results, fitting.gram)
        results = [new if s.refit else old for s, new, old in zip(settings, again, results, strict=True)]
    layers = zip(some, problem.goals, results, strict=True)
    return [InitialRounding(t.name, goal, found, t.quant_format) for t, goal, found in layers], _damped(
        fitting.gram, factor
    )


def _relearned(layer: RoundedLayer, found: Quantized | None, weight: Tensor, gram: Tensor, gain: float) -> RoundedLayer:
    """The layer with what was learned and what the report says of it."""
    if found is None:
        return replace(layer, metrics=replace(layer.metrics, gram_gain=0.0))
    new, error = with_codes(layer, found, weight), dequantize(*found).float() - weight
    power = quadratic_form(weight, gram, coarse=True).clamp_min(1e-30)
    output_error = float(quadratic_form(error, gram, coarse=True) / power)
    return replace(new, metrics=replace(new.metrics, output_error=output_error, gram_gain=gain))


def choose_stops(
    initial: Sequence[InitialRounding], fitting: Tensor, held_out: Tensor, schedule: GramSchedule
) -> dict[str, Stop]:
    """Where learning from one Gram matrix is best on another, layer by layer.

    Args:
        initial: Layers of one input, each with its goal ``[out, in]`` float32 for its weight.
        fitting: ``[in, in]`` float32, damped Gram matrix of the tokens to learn from.
        held_out: ``[in, in]`` float32, that of the held-out tokens.
        schedule: Steps and seed.
    """

    def errors(layers: Mapping[str, Quantized]) -> dict[str, float]:
        differences = [dequantize(*layers[s.name]).float() - s.weight for s in initial]
        losses = torch.stack([quadratic_form(d, held_out, coarse=True) for d in differences]).tolist()
        return dict(zip((s.name for s in initial), losses, strict=True))

    def judge(layers: Mapping[str, Quantized], seen: Mapping[str, Stop]) -> None:
        for name, error in errors(layers).items():
            if error < least[name]:
                least[name], best[name], stops[name] = error, layers[name], seen[name]

    best = {s.name: s.rounded for s in initial}
    stops = {s.name: Stop() for s in initial}
    start = errors(best)
    least, check, latest = dict(start), 0, best
    for check, latest in annealed(initial, fitting, schedule):  # noqa: B007 (read after the loop)
        judge(latest, {s.name: Stop(check) for s in initial})
    # Annealing leaves codes that single moves still improve: the last ones, worse as they are, may end below the best.
    beginnings = (dict(best), dict(stops)), (latest, {s.name: Stop(check) for s in initial})
    for layers, seen in beginnings:
        descended = {s.name: descend(layers[s.name], s.quant_format, s.weight, fitting) for s in initial}
        judge(descended, {name: replace(stop, descended=True) for name, stop in seen.items()})
    return {name: replace(stop, gain=1 - least[name] / max(start[name], 1e-30)) for name, stop in stops.items()}


def learn(
    initial: Sequence[InitialRounding], fitting: Tensor, schedule: GramSchedule, stops: Mapping[str, Stop]
) -> dict[str, Quantized]:
    """Codes, scales and zero points of every layer at its stop; the others are those of `choose_stops`."""
    found = {s.name: s.rounded for s in initial}
    last = max((stops[s.name].check for s in initial), default=0)
    for check, layers in annealed(initial, fitting, schedule) if last else ():
        found |= {name: layer for name, layer in layers.items() if stops[name].check == check}
        if check == last:
            break
    for start in (s for s in initial if stops[s.name].descended):
        found[start.name] = descend(found[start.name], start.quant_format, start.weight, fitting)
    return found


def annealed(
    initial: Sequence[InitialRounding], fitting: Tensor, schedule: GramSchedule
) -> Iterator[tuple[int, dict[str, Quantized]]]:
    """Number and codes, scales and zero points of every check, as steps are taken."""
    kinds, steps = by_kind(initial), schedule.steps
    learned = [GumbelLayers(kind, steps, schedule.seed, REACH) for kind in kinds]
    goals = [torch.cat([s.weight for s in kind]) for kind in kinds]
    rates = logit_rate(steps), scale_rate(steps)
    optimizer = SignMomentum(
        {"params": parameters, "lr": 0.0}
        for parameters in ([layers.logits for layers in learned], [layers.log_change for layers in learned])
    )
    interval = max(1, -(-steps // CHECKS))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        for layers, goal in zip(learned, goals, strict=True):
            layers.collect_from(half_gradient(layers.soft().view_as(goal), goal, fitting).view_as(layers.codes))
        optimizer.step()
        for layers in learned:
            layers.confine()
        if (step + 1) % interval == 0 or step + 1 == steps:
            yield -(-(step + 1) // interval), {n: q for layers in learned for n, q in layers.rounded().items()}


def half_gradient(weight: Tensor, goal: Tensor, gram: Tensor) -> Tensor:
    """(W - goal) H, half the gradient of tr(E H Eᵀ) by the weight, ``[out, in]`` float32; uses the weight up.

    A GPU multiplies in TF32: steps follow signs alone.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return weight.sub_(goal) @ gram
    finally:
        torch.set_float32_matmul_precision(before)
