"""What a run leaves as it is, for the announcement and the report."""

from __future__ import annotations

from hawqtool.model.kept import EXPECTED, LOUD_SHARE, KeptTensor, kept_share
from hawqtool.pipeline.run.job import Job
from hawqtool.report.schema import Kept


def kept_record(job: Job) -> Kept:
    """The matrices that are kept whatever the settings, by reason and pattern of their names, large ones first."""
    found: dict[tuple[str, str], list[KeptTensor]] = {}
    tables = {table.tensor for table in job.tables}
    for tensor in (tensor for tensor in job.structure.kept if tensor.name not in tables):
        found.setdefault((tensor.reason, tensor.pattern), []).append(tensor)
    return {
        "bytes": sum(t.num_bytes for t in job.structure.kept if t.reason not in EXPECTED),
        "share": kept_share(job.structure.kept, job.index),
        "rows": [
            {
                "reason": reason,
                "count": len(tensors),
                "bytes": sum(t.num_bytes for t in tensors),
                "pattern": pattern,
                "example": tensors[0].name,
            }
            for (reason, pattern), tensors in sorted(
                found.items(), key=lambda item: (-sum(t.num_bytes for t in item[1]), item[0])
            )
        ],
    }


def kept_warnings(kept: Kept) -> list[str]:
    """One line where more of the checkpoint is kept than a user expects."""
    if kept["share"] <= LOUD_SHARE:
        return []
    row = next(row for row in kept["rows"] if row["reason"] not in EXPECTED)
    return [
        f"{100 * kept['share']:.1f} % of the checkpoint stays as it is beside embeddings and head, most of it "
        f"{row['pattern']} ({row['reason']}); --max-kept sets a limit"
    ]
