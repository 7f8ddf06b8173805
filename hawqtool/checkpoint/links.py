"""Entries of a checkpoint folder: what is no file, and links that lead out of it."""

from __future__ import annotations

import stat
from pathlib import Path

from hawqtool.checkpoint.companions import companion_folders
from hawqtool.errors import InputError


def check_links(folder: Path) -> None:
    """Refuse what cannot be read as part of a checkpoint, before anything opens it.

    Links to files outside would be read, and copied into the output, as part of it; links within the folder are
    allowed, and those of a hub cache, ``snapshots/COMMIT/NAME`` to ``blobs/HASH``. Pipes and devices would wait
    forever. Folders are looked into where they belong to the checkpoint.

    Args:
        folder: An existing folder; it may itself be reached by a link.

    Raises:
        InputError: If a link leaves the folder or leads nowhere, an entry is neither file nor folder, or the folder
            cannot be listed.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        entries = sorted(folder.iterdir())
        for name in companion_folders(folder):
            entries += [folder / name, *sorted((folder / name).rglob("*"))]
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from None
    companions = set(companion_folders(folder))
    for path in entries:
        if not path.name.startswith("."):
            outer = path.is_dir() and str(path.relative_to(folder)) not in companions
            _check_entry(path, [] if outer else allowed)


def _check_entry(path: Path, allowed: list[Path]) -> None:
    """Check one entry; folders that nobody looks into may lie anywhere."""
    target = _target(path)
    if target is None:
        raise InputError(
            f"{path} is a link that leads nowhere; expected a file; download the checkpoint again, or remove the link"
        )
    kind = target.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise InputError(f"{path} is a pipe, socket or device; expected files and folders alone; remove it")
    if allowed and path.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path} is a link that leaves the folder; expected files, or links within it as in a hub cache; "
            "copy the file that it points to, or give the folder where that lies"
        )


def _target(path: Path) -> Path | None:
    """Where a link ends, None if that does not exist or it goes in circles."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
