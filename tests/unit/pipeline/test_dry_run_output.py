"""Where an output may go, before any work: links, mount points, folders that hold more than ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.export.manifest import seal
from hawqtool.pipeline.dry_run import check_free, output_folder
from hawqtool.pipeline.run.files import REPORT_SCHEMA
from hawqtool.pipeline.run.folder import RunFolder
from hawqtool.runtime.reporter import Silent


def config(output: Path, model: Path | None = None) -> RunConfig:
    return RunConfig(model=str(model or output.parent / "model"), output=str(output), overwrite=True)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    seal(folder, {"schema": REPORT_SCHEMA})
    return folder


def test_a_link_leads_to_the_output(tmp_path: Path, ours: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(ours)
    assert output_folder(config(link)) == ours.resolve()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later")
    assert output_folder(config(dangling)) == (tmp_path / "later").resolve()


def test_links_in_a_circle_and_mount_points_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for output, said in (
        (tmp_path / "a", "cannot be used"),
        (Path("/"), "mount point"),
        (tmp_path / "no/out", "parent"),
    ):
        with pytest.raises(UsageError, match=said):
            output_folder(config(output))


def test_overwriting_removes_only_what_is_ours(tmp_path: Path, ours: Path) -> None:
    check_free(config(ours), ours)
    (ours / "README.md").write_text("edited")
    check_free(config(ours), ours)
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt, which hawqtool did not write"):
        check_free(config(ours), ours)


def test_the_model_is_never_overwritten(tmp_path: Path, ours: Path) -> None:
    inside = ours / "model"
    inside.mkdir()
    for model in (ours, inside):
        with pytest.raises(UsageError, match="would remove with the model"):
            check_free(config(ours, model), ours)
    link = tmp_path / "link"
    link.symlink_to(inside)
    with pytest.raises(UsageError, match="would remove with the model"):
        check_free(config(ours, link), ours)


def test_a_private_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "saved").mkdir(parents=True)
    (tmp_path / ".out.hawqtool").symlink_to(precious)
    with pytest.raises(UsageError, match="is a link"):
        RunFolder(tmp_path / "out", Silent()).__enter__()
    assert (precious / "saved").is_dir()
