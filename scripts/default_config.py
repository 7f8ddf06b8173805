"""Write configs/default.yaml, every setting with its help and default; with --check, only say whether it is current.

python scripts/default_config.py
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "configs/default.yaml"
WIDTH = 118
HEADER = """\
# Every key of a run with its default, made by scripts/default_config.py from hawqtool/settings. Keys equal the flags
# of hawqtool quantize (--target-bpw is target_bpw); flags win over this file, null means that the run decides as the
# comment says, and unknown keys are errors. Exactly one of target_bpw, target_size, target_kl and plan is needed. The
# values of model, output and target_bpw are examples.
"""


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file is not current")
    if parser.parse_args().check:
        current = FILE.is_file() and FILE.read_text(encoding="utf-8") == text()
        if not current:
            print(f"{FILE.name} is not current; run python scripts/default_config.py", file=sys.stderr)
        return 0 if current else 1
    FILE.write_text(text(), encoding="utf-8")
    return 0


def text() -> str:
    """What the file should hold."""
    from hawqtool.config import SETTINGS, RunConfig

    defaults = RunConfig(model="-").model_dump(mode="json")
    parts = [HEADER]
    for panel, names in groupby(SETTINGS, lambda name: SETTINGS[name].panel):
        parts.append(f"\n# --- {panel[0].lower()}{panel[1:]} ".ljust(WIDTH + 1, "-") + "\n")
        for name in names:
            setting = SETTINGS[name]
            value = setting.example if setting.example is not None else defaults[name]
            parts.append(f"\n{comment(name)}\n{name}: {shown(value)}\n")
    return "".join(parts)


def comment(name: str) -> str:
    """Help and details of a setting; the default in words only where its value does not say it."""
    from hawqtool.config import SETTINGS, RunConfig
    from hawqtool.settings.metadata import help_of

    setting, field = SETTINGS[name], RunConfig.model_fields[name]
    said = help_of(field, setting) if field.default is None else setting.help
    return textwrap.fill(f"{said} {setting.detail}".strip(), WIDTH, initial_indent="# ", subsequent_indent="# ")


def shown(value: object) -> str:
    """A value as YAML, which JSON is but for bare words."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
