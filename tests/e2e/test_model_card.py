"""The model card of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hawqtool.export.verify import verify_folder
from tests.support.runs import Report, Run, read
from tests.support.tiny import tiny_llama


def front_matter(folder: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_the_folder_has_a_card_with_the_figures_of_its_report(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert front_matter(folder)["base_model_relation"] == "quantized"
    assert f"{report['sizes']['quantized_bytes']:,} bytes" in card
    assert f"{report['evaluation']['mixed']['kl']:.4f} ±" in card
    chosen = report["evaluation"]["mixed"]["chosen_by"]
    assert f"`{chosen}`" in card and report["metric"] == (chosen if chosen == "projection" else None)
    assert [e["engine"] for e in read(folder / "report.json")["engines"] if e["engine"] in card.replace("\\", "")]
    assert report["architecture"] == "LlamaForCausalLM"


def test_the_card_replaces_the_one_of_the_source(run: Run, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    text = "---\nlicense: mit\nlanguage: [no]\nbase_model: org/base\n---\nText of the original.\n"
    (source / "ReadMe.md").write_bytes(text.encode() + b"\xff" * 10 + b"x" * (2 << 20))
    folder, report = run(model=source, bits="4", target_bpw=4.5)
    assert [path.name for path in folder.iterdir() if path.name.lower() == "readme.md"] == ["README.md"]
    front = front_matter(folder)
    assert (front["license"], front["language"], front["base_model"]) == ("mit", ["no"], "org/base")
    assert "Text of the original" not in (folder / "README.md").read_text(encoding="utf-8")
    assert report["metric"] is None
    assert verify_folder(folder, source).problems == ()
