"""Errors that the tests must notice, each with the tests that are meant to: read by `mutants`."""

from __future__ import annotations

from typing import NamedTuple


class PlantedError(NamedTuple):
    """A wrong text in the place of a right one.

    Args:
        name: What goes wrong.
        path: File, from the root of the repository.
        right: Text that occurs in it exactly once.
        wrong: Text that takes its place.
        tests: Arguments of pytest: what should fail then.
    """

    name: str
    path: str
    right: str
    wrong: str
    tests: tuple[str, ...]


_DIVERGENCE = "tests/reference/evaluation/test_divergence.py"
_SELECTION = "tests/unit/pipeline/search/test_selection.py"
_PAIRED = "tests/unit/evaluation/test_paired.py"
_DEFAULT_PATH = "tests/reference/streaming/test_stream_default_path.py"
_LAYER = "tests/reference/rounding/test_layer.py"
_DRIFT = "tests/reference/rounding/test_input_drift.py"
_GAP = "tests/unit/allocation/test_exact.py::test_the_gap_is_that_of_the_plan_that_is_returned"
_SECOND = (
    "tests/unit/allocation/test_exact.py::"
    "test_a_plan_over_the_second_budget_by_less_than_the_tolerance_of_highs_is_not_taken"
)
_TRACE = "tests/reference/sensitivity/curvature/test_trace.py::test_hawq_is_half_trace_over_weights_times_error"
_LIMIT = "tests/reference/sensitivity/test_measure_limit.py"
_FAKE_QUANT = "tests/reference/rounding/learned/test_fake_quant.py"
_BLOCK = "tests/reference/rounding/learned/test_block.py"
_END_TO_END = "tests/reference/rounding/learned/test_end_to_end.py"

_FIGURES = (
    PlantedError(
        "standard error over n instead of its root",
        "hawqtool/evaluation/divergence.py",
        "return float(values.std(correction=1)) / len(values) ** 0.5",
        "return float(values.std(correction=1)) / len(values)",
        (_DIVERGENCE,),
    ),
    PlantedError(
        "paired difference with the standard error of unpaired rows",
        "hawqtool/evaluation/divergence.py",
        "return float(difference.mean()), standard_error(difference)",
        "return float(difference.mean()), math.hypot(first.stderr, second.stderr)",
        (_DIVERGENCE,),
    ),
    PlantedError(
        "perplexity of the token itself instead of the next",
        "hawqtool/evaluation/divergence.py",
        "following = row[positions.start + 1 : positions.stop + 1]",
        "following = row[positions.start : positions.stop]",
        (_DIVERGENCE,),
    ),
    PlantedError(
        "perplexity over one token too many",
        "hawqtool/evaluation/divergence.py",
        "float(losses) / (len(row) - 1)",
        "float(losses) / len(row)",
        (_DIVERGENCE,),
    ),
    PlantedError(
        "divergence of the candidate from the original turned round",
        "hawqtool/evaluation/divergence.py",
        "(log_p.exp() * (log_p - log_q))",
        "(log_q.exp() * (log_q - log_p))",
        (_DIVERGENCE,),
    ),
    PlantedError(
        "standard error of scores over n instead of its root",
        "hawqtool/sensitivity/scores.py",
        "spread / count**0.5",
        "spread / count",
        ("tests/reference/sensitivity/test_measured_kl.py::test_it_equals_whole_model_passes_with_one_unit_replaced",),
    ),
    PlantedError(
        "Hutchinson's standard error over rows times probes",
        "hawqtool/sensitivity/curvature/trace.py",
        "score = mean_score(values.mean(1))",
        "score = mean_score(values.flatten())",
        (_TRACE,),
    ),
    PlantedError(
        "Hutchinson's standard error of the score over rows times probes",
        "hawqtool/sensitivity/curvature/trace.py",
        "traces[m.name].mean(1) / m.num_weights",
        "traces[m.name].flatten() / m.num_weights",
        (_TRACE,),
    ),
    PlantedError(
        "a gate that NaN passes",
        "hawqtool/evaluation/gates.py",
        "else found <= limit",
        "else not found > limit",
        ("tests/unit/evaluation/test_gates.py",),
    ),
)

_CHOICE = (
    PlantedError(
        "a short list of one has the rule too",
        "hawqtool/pipeline/search/planner.py",
        "        if most < _WITH_RULE:\n",
        "        if most < 1:\n",
        ("tests/e2e/test_targets.py::test_a_short_list_of_one_has_the_metrics_own_plan_alone",),
    ),
    PlantedError(
        "sign of the choice",
        "hawqtool/evaluation/paired.py",
        "self.value < -self.needed(tried) * math",
        "self.value > self.needed(tried) * math",
        (_SELECTION,),
    ),
    PlantedError(
        "threshold of the normal distribution, whatever the number of rows",
        "hawqtool/evaluation/paired.py",
        "float(stdtrit(self.freedom, 1 - LEVEL / tried))",
        "float(stdtrit(1e9, 1 - LEVEL / tried))",
        (_SELECTION,),
    ),
    PlantedError(
        "two-sided threshold of the choice",
        "hawqtool/evaluation/paired.py",
        "1 - LEVEL / tried))",
        "1 - LEVEL / 2 / tried))",
        (_SELECTION,),
    ),
    PlantedError(
        "choice that forgets how many plans were tried",
        "hawqtool/pipeline/search/selection.py",
        "_is_better(difference, selection.tried)",
        "_is_better(difference, 1)",
        (_SELECTION,),
    ),
    PlantedError(
        "choice that takes the calibration rows for the only ones",
        "hawqtool/pipeline/search/selection.py",
        "difference.is_less(tried, DRAW_NOISE * difference.base)",
        "difference.is_less(tried)",
        (_SELECTION,),
    ),
    PlantedError(
        "choice in which one source of rows may lose",
        "hawqtool/evaluation/paired.py",
        "noise) and not loses",
        "noise)",
        (_SELECTION,),
    ),
    PlantedError(
        "standard error of a mean over sources as if they were one",
        "hawqtool/evaluation/paired.py",
        "(stderr / len(means)) ** 2",
        "stderr**2",
        (_PAIRED,),
    ),
    PlantedError(
        "choice between mixed and uniform on the report rows",
        "hawqtool/pipeline/search/selection.py",
        'return compare_paired(mixed.quality["selection"], uniform.quality["selection"])',
        'return compare_paired(mixed.quality["report"], uniform.quality["report"])',
        (_SELECTION,),
    ),
    PlantedError(
        "choice among mixed plans on the report rows",
        "hawqtool/pipeline/search/trials.py",
        'return balanced_divergence(self.quality["selection"])',
        'return balanced_divergence(self.quality["report"])',
        (_SELECTION,),
    ),
    PlantedError(
        "choice among mixed plans by the rows of the larger source",
        "hawqtool/pipeline/search/trials.py",
        'return balanced_divergence(self.quality["selection"])',
        'return self.quality["selection"].divergence',
        (_SELECTION,),
    ),
    PlantedError(
        "rule that favours gate and up instead of down",
        "hawqtool/allocation/role_rule.py",
        "(down_proj|w2|fc2",
        "(gate_proj|up_proj|w2|fc2",
        ("tests/unit/allocation/test_role_rule.py",),
    ),
    PlantedError(
        "swaps by gradient taken as predicted",
        "hawqtool/pipeline/search/gradient_swap.py",
        '"accepted": difference.is_less(count),',
        '"accepted": True,',
        ("tests/unit/pipeline/search/test_gradient_swap.py::test_only_the_true_divergence_takes_a_move",),
    ),
    PlantedError(
        "short list by the largest pair loss",
        "hawqtool/pipeline/search/shortlist.py",
        "key=lambda item: pair_loss(item[1], table)",
        "key=lambda item: -pair_loss(item[1], table)",
        ("tests/unit/pipeline/search/test_shortlist.py",),
    ),
    PlantedError(
        "pair loss without the terms between units",
        "hawqtool/pipeline/search/shortlist.py",
        "torch.stack(measured).sum(0).square().mean()",
        "torch.stack(measured).square().sum(0).mean()",
        ("tests/unit/pipeline/search/test_shortlist.py",),
    ),
)

_SENSITIVITY = (
    PlantedError(
        "gradient at the plan for labels instead of the original's outputs",
        "hawqtool/sensitivity/plan_gradient.py",
        "q - original.softmax(-1)",
        "q - torch.nn.functional.one_hot(original.argmax(-1), q.shape[-1])",
        (
            "tests/reference/sensitivity/test_plan_gradient.py"
            "::test_the_first_order_is_the_gradient_of_the_true_divergence",
        ),
    ),
    PlantedError(
        "gradients never limited",
        "hawqtool/sensitivity/measure.py",
        "gradients = limit.limited(gradients, ranks)",
        "gradients = list(gradients)",
        (_LIMIT,),
    ),
    PlantedError(
        "importance of exploding rows as it is",
        "hawqtool/sensitivity/token_importance.py",
        "limited_powers(power, start).double()",
        "power.double()",
        (_LIMIT,),
    ),
    PlantedError(
        "importance without its exponent",
        "hawqtool/sensitivity/token_importance.py",
        "EXPONENT = 0.5",
        "EXPONENT = 1.0",
        (_DEFAULT_PATH,),
    ),
    PlantedError(
        "scores twice as large",
        "hawqtool/sensitivity/scores.py",
        "scale = 2 * layer.outputs",
        "scale = layer.outputs",
        ("tests/reference/sensitivity/test_scores.py::test_score_rows_equals_slow_loops",),
    ),
    PlantedError(
        "width swaps at the original's Gram matrices",
        "hawqtool/sensitivity/width_swap.py",
        "            advance(block, known)\n            advance(block, seen)",
        "            with original.block(block.spec.index) as source:\n"
        "                advance(source, known)\n            advance(block, seen)",
        ("tests/reference/sensitivity/test_width_swap.py::test_a_swap_is_a_whole_model_with_one_unit_changed",),
    ),
    PlantedError(
        "shrinkage trusts noise",
        "hawqtool/sensitivity/shrinkage.py",
        "weight = spread / (spread + noise)",
        "weight = noise / (spread + noise)",
        ("tests/reference/sensitivity/test_shrinkage.py",),
    ),
)

_ROUNDING = (
    PlantedError(
        "rows of a layer, shared by ranks, shifted by the drift of other rows",
        "hawqtool/streaming/dealt.py",
        "output_drift=drift[ranks.share(len(drift))]",
        "output_drift=drift.flip(0)[ranks.share(len(drift))]",
        ("tests/reference/streaming/test_dealt.py",),
    ),
    PlantedError(
        "scales of a layer, whose rows ranks share, in another order than its codes",
        "hawqtool/streaming/dealt.py",
        "scales = torch.cat([layer.scales for layer in layers])",
        "scales = torch.cat([layer.scales for layer in layers[::-1]])",
        ("tests/reference/streaming/test_dealt.py",),
    ),
    PlantedError(
        "share of the target shift",
        "hawqtool/rounding/two_pass.py",
        "t.weight + s.shift * full_shift",
        "t.weight + 0.9 * s.shift * full_shift",
        (_DEFAULT_PATH,),
    ),
    PlantedError(
        "shift chosen on the rows that it was fitted to",
        "hawqtool/rounding/layer.py",
        "best_shift(t.weight, whole, held_out",
        "best_shift(t.weight, whole, fitting",
        (_DRIFT,),
    ),
    PlantedError(
        "each row's worse pass kept",
        "hawqtool/rounding/two_pass.py",
        "better = (losses < least)",
        "better = (losses > least)",
        (_DEFAULT_PATH,),
    ),
    PlantedError(
        "FOEM's pull once instead of twice in the error",
        "hawqtool/rounding/kernels/numba_cpu.py",
        "np.float32((1 - beta) ** 2)",
        "np.float32(1 - beta)",
        (_LAYER,),
    ),
    PlantedError(
        "the highest code never used",
        "hawqtool/rounding/kernels/numba_cpu.py",
        "high[r] - shift) + _ROUND",
        "high[r] - shift - np.float32(1)) + _ROUND",
        (_LAYER,),
    ),
    PlantedError(
        "learned offsets may pass the border of the grid",
        "hawqtool/rounding/learned/fake_quant.py",
        "torch.minimum(self.latent + reach, self.high + EDGE)",
        "self.latent + reach",
        (_FAKE_QUANT,),
    ),
    PlantedError(
        "little damping with few tokens",
        "hawqtool/rounding/factor.py",
        "return DAMPING if num_tokens >= SCARCE_TOKENS_PER_COLUMN * in_features else SCARCE_DAMPING",
        "return DAMPING",
        (_LAYER,),
    ),
    PlantedError(
        "products of panels counted once",
        "hawqtool/rounding/gram.py",
        "gram[:first, columns], alpha=2.0",
        "gram[:first, columns], alpha=1.0",
        (_LAYER,),
    ),
    PlantedError(
        "held-out rows left in what is fitted",
        "hawqtool/rounding/statistics.py",
        "gram = self.gram * share - held.gram * held_share",
        "gram = self.gram",
        (_DRIFT,),
    ),
    PlantedError(
        "the last step kept instead of the best",
        "hawqtool/rounding/learned/training.py",
        "                kept = [tensor.clone() for tensor in learned]\n            if time",
        "            kept = [tensor.clone() for tensor in learned]\n            if time",
        (_BLOCK, _END_TO_END),
    ),
    PlantedError(
        "distillation learns from the rows that it holds out",
        "hawqtool/rounding/learned/end_to_end.py",
        "order = batch_order(fitting, schedule.steps, schedule.seed)",
        "order = batch_order(len(inputs), schedule.steps, schedule.seed)",
        (f"{_END_TO_END}::test_nothing_is_learned_from_held_out_batches",),
    ),
    PlantedError(
        "distillation takes held-out rows for fitting ones",
        "hawqtool/pipeline/stages/distill.py",
        "fitting, held_out = split_rows(rows)",
        "held_out, fitting = split_rows(rows)",
        ("tests/e2e/test_distillation.py::test_the_folder_has_the_divergence_that_was_reported",),
    ),
    PlantedError(
        "roundings to score are fitted to the rows that stop their learning",
        "hawqtool/pipeline/stages/measure.py",
        "return fitting_rows(calibration) if job.config.sensitivity_steps else measuring_rows(job, calibration)",
        "return calibration",
        ("tests/e2e/test_refined_scores.py::test_held_out_rows_only_stop_the_learning",),
    ),
)

_PLANS_AND_FILES = (
    PlantedError(
        "what a process read before it joined is not compared",
        "hawqtool/checkpoint/content.py",
        '            self.check(place, digest, f"at byte {place[1]}")\n',
        "            self._digests.setdefault(place, digest)\n",
        (
            "tests/unit/checkpoint/test_content.py::test_what_another_process_recorded_is_compared_with_what_was_read_meanwhile",
        ),
    ),
    PlantedError(
        "second budget unchecked on the plan of HiGHS",
        "hawqtool/allocation/exact.py",
        "if stored <= self.budget and (self.second is None or self.second.allows(formats)):",
        "if stored <= self.budget:",
        (_SECOND,),
    ),
    PlantedError(
        "gap relative to a worse plan",
        "hawqtool/allocation/exact.py",
        "if outcome.plan is None and best_loss - linear <= window:",
        "if best_loss - linear <= window:",
        (_GAP,),
    ),
    PlantedError(
        "slack spent twice",
        "hawqtool/allocation/frontier.py",
        "        slack -= edge.cost_bytes\n",
        "",
        ("tests/unit/allocation/test_frontier.py::test_hull_and_exact_against_brute_force",),
    ),
    PlantedError(
        "a quality target met by plans that miss it",
        "hawqtool/allocation/quality_target.py",
        "if found.measured <= bound:",
        "if found.measured <= bound * 1.5:",
        ("tests/unit/allocation/test_quality_target.py",),
    ),
    PlantedError(
        "codes above the border packed into their neighbours",
        "hawqtool/checkpoint/packing.py",
        "int(codes.max()) > high",
        "int(codes.max()) > high + 1",
        ("tests/unit/checkpoint/test_packing.py",),
    ),
    PlantedError(
        "codes below the border packed into their neighbours",
        "hawqtool/checkpoint/packing.py",
        "int(codes.min()) < low",
        "int(codes.min()) < low - 1",
        ("tests/unit/checkpoint/test_packing.py",),
    ),
    PlantedError(
        "scales of a row too few in the predicted size",
        "hawqtool/formats/__init__.py",
        'StoredPart(".weight_scale", scale_dtype, (out_features, groups))',
        'StoredPart(".weight_scale", scale_dtype, (out_features - 1, groups))',
        ("tests/unit/test_formats.py",),
    ),
    PlantedError(
        "rows that two sets share",
        "hawqtool/pipeline/stages/rows.py",
        "    if shared:\n",
        "    if shared > 1000:\n",
        ("tests/cli/test_bad_input.py::test_bad_input[repeated calibration]",),
    ),
    PlantedError(
        "saved states believed without their checksum",
        "hawqtool/pipeline/run/checkpoints.py",
        "size < _LENGTH_BYTES or stream.read() != digest.digest()",
        "size < _LENGTH_BYTES",
        ("tests/unit/pipeline/run/test_checkpoints.py::test_no_flipped_bit_is_believed",),
    ),
    PlantedError(
        "NaN errors plausible",
        "hawqtool/export/plausibility.py",
        "wrong = (~(found <= allowed))",
        "wrong = (found > allowed)",
        ("tests/unit/export/test_plausibility.py",),
    ),
    PlantedError(
        "files that the manifest does not know pass",
        "hawqtool/export/manifest.py",
        "        if name not in listed:\n",
        "        if False and name not in listed:\n",
        ("tests/unit/export/test_manifest.py::test_an_added_file",),
    ),
    PlantedError(
        "failed gates of no consequence",
        "hawqtool/cli/quantize.py",
        'if not gate["passed"])\n    if failed:',
        'if not gate["passed"])\n    if len(failed) > 9:',
        ("tests/cli/test_gates.py::test_failed_gates_exit_3_and_keep_what_was_made",),
    ),
)

PLANTED = (*_FIGURES, *_CHOICE, *_SENSITIVITY, *_ROUNDING, *_PLANS_AND_FILES)
