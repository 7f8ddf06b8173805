"""Names under which transformers stores the tensors of each family: keep a frozen list, and say what has changed.

A line of the list is one family: its class, the settings of a tiny model, and the tensors that are stored of it, layers
and experts folded to ``N``, each with the number of its dimensions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "support" / "stored_layouts.jsonl"
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "architectures")


@dataclass(frozen=True)
class Family:
    """What transformers stores of a model.

    Args:
        model_type: As in config.json.
        model: Name of the class.
        config: Settings of a tiny model.
        tensors: Number of dimensions by folded name.
    """

    model_type: str
    model: str
    config: dict[str, Any]
    tensors: dict[str, int]


def read_families(path: Path = FIXTURE) -> dict[str, Family]:
    """The frozen list, by type and class."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {_key(family): family for family in (Family(**json.loads(line)) for line in lines)}


def _key(family: Family) -> str:
    return f"{family.model_type}:{family.model}"


def stored_now(family: Family) -> dict[str, int]:
    """What the installed transformers stores of the family's tiny model."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(family.config), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(place)
        getattr(transformers, family.model)._from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        return dict(sorted(_folded(Path(place))))


def _folded(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield re.sub(r"(?<=\.)\d+(?=\.)", "N", name), len(file.get_slice(name).get_shape())


def differences(family: Family, tensors: dict[str, int]) -> list[str]:
    """What is stored otherwise than the list says, in words."""
    known = family.tensors
    found = [f"{name} is no longer stored" for name in known.keys() - tensors.keys()]
    found += [f"{name} is new" for name in tensors.keys() - known.keys()]
    both = known.keys() & tensors.keys()
    found += [f"{n} had {known[n]} dimensions, has {tensors[n]}" for n in both if known[n] != tensors[n]]
    return sorted(found)


def family_of(folder: Path) -> Family:
    """The family of a folder with a config.json that names a class."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in config.items() if name not in _VOLATILE}
    family = Family(config["model_type"], config["architectures"][0], settings, {})
    return Family(family.model_type, family.model, settings, stored_now(family))


def write_families(families: Iterable[Family], path: Path = FIXTURE) -> None:
    """Write the list, one line per family."""
    lines = sorted(json.dumps(asdict(family), sort_keys=True) for family in families)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> int:
    """Check, refresh or extend the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if transformers stores otherwise")
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], help="folders with a config.json of further families"
    )
    options = parser.parse_args()
    families = read_families()
    changed = {}
    for key, family in families.items():
        tensors = stored_now(family)
        for line in differences(family, tensors):
            print(f"{key}: {line}")
            changed[key] = Family(family.model_type, family.model, family.config, tensors)
    if options.check:
        return int(bool(changed))
    added = {_key(family): family for family in map(family_of, options.add)}
    write_families((families | changed | added).values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
