"""Symbolic links of a checkpoint folder: what they may point to."""

from __future__ import annotations

from pathlib import Path

from hawqtool.errors import InputError


def check_links(folder: Path) -> None:
    """Refuse links to files outside a checkpoint: they would be read, and copied into the output, as part of it.

    Links within the folder are allowed, and those of a hub cache, ``snapshots/COMMIT/NAME`` to ``blobs/HASH``.

    Args:
        folder: An existing folder; it may itself be reached by a link.

    Raises:
        InputError: If a link leaves the folder; or the folder cannot be listed.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        links = sorted(path for path in folder.iterdir() if path.is_symlink() and not path.is_dir())
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from None
    for path in links:
        target = _target(path)
        if target is None or not any(target.is_relative_to(place) for place in allowed):
            raise InputError(
                f"{path} is a link that leaves the folder; expected files, or links within it as in a hub cache; "
                "copy the file that it points to, or give the folder where that lies"
            )


def _target(path: Path) -> Path | None:
    """Where a link ends, None if it goes in circles."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None
