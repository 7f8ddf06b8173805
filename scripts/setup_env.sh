# Sourced by scripts/test and scripts/demo: defines ROOT, VENV, PY and setup_env.
#
#   setup_env EXTRA    make .venv at the repository root and install the package with that extra
#
# PYTHON names the interpreter that makes .venv (default: python3, at least 3.11).

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
PY="$VENV/bin/python"
CONSTRAINTS="$ROOT/scripts/constraints.txt"

# A shared machine would otherwise spin; nothing may ask a model hub; bars and warnings do not belong in a log.
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
export HF_HUB_DISABLE_PROGRESS_BARS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Without bytecode every process compiles torch and transformers anew, which takes ten seconds.
unset PYTHONDONTWRITEBYTECODE

setup_env() {
    local extra=$1 stamp="$VENV/.installed-$1" wanted
    wanted=$( { echo "$ROOT"; cat "$ROOT/pyproject.toml" "$CONSTRAINTS"; } | cksum)
    if [[ -x $PY && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "setting up .venv (extra: $extra)" >&2
    if ! "$PY" -m pip --version >/dev/null 2>&1; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
            return 2
        }
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    # Most modules are never imported: compiling all of them takes longer than the few that are.
    if ! "$PY" -c 'import torch' 2>/dev/null; then
        refuse_cuda_torch
        "$PY" -m pip install -qq --no-compile -c "$CONSTRAINTS" torch==2.13.0
    fi
    "$PY" -m pip install -qq --no-compile -c "$CONSTRAINTS" -e "$ROOT[$extra]"
    echo "$wanted" >"$stamp"
}

# The CUDA build of torch takes several GB and these scripts run on a CPU, so look before downloading.
refuse_cuda_torch() {
    [[ ${ALLOW_CUDA_TORCH:-0} == 1 ]] && return
    local report
    report=$("$PY" -m pip install -qq --dry-run --ignore-installed --no-deps --report - \
        -c "$CONSTRAINTS" torch==2.13.0)
    if ! "$PY" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
(found,) = json.load(sys.stdin)["install"]
needs = map(Requirement, found["metadata"].get("requires_dist", []))
used = [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
sys.exit(any(name.startswith(("nvidia-", "cuda-", "triton")) for name in used))' <<<"$report"; then
        echo "error: pip would install a CUDA build of torch 2.13.0 (several GB). Install its CPU build into .venv" >&2
        echo "first, or let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name a place that has it; ALLOW_CUDA_TORCH=1" >&2
        echo "accepts the CUDA build." >&2
        return 2
    fi
}
