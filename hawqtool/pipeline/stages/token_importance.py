"""How much each calibration token counts where layers are rounded."""

from __future__ import annotations

from dataclasses import replace

from hawqtool.pipeline.run.context import RunContext
from hawqtool.records import Rows
from hawqtool.sensitivity.token_importance import token_importance

_KEY = "token-importance"
_BATCH_ROWS = {"cpu": 2, "cuda": 8}
"""Rows of a pass with gradients, whose memory they set; fixed per kind of device, because they change sums."""

_CPU_BYTES = 2 << 30
"""Most bytes of hidden states that are kept together where no limit was given."""


def with_token_importance(context: RunContext, rows: Rows) -> Rows:
    """The calibration rows with the importance of their tokens, where the configuration wants them and they have none.

    Args:
        context: The run, whose store keeps it.
        rows: Calibration rows.
    """
    job = context.job
    if not job.settings.uses_token_importance or rows.importance is not None:
        return rows
    importance = context.saved.load(_KEY)
    if importance is None:
        importance = token_importance(
            job.stream(),
            rows.tokens,
            min(_BATCH_ROWS[job.device.type], job.settings.batch_size),
            _CPU_BYTES if job.offload is None else job.offload.memory_bytes,
            job.config.seed,
            context.progress("token importance"),
        )
        context.saved.save(_KEY, dict(importance))
    return replace(rows, importance=importance)
