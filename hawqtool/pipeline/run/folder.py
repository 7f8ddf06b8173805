"""The private folder of a run beside its output: held by one run at a time, kept when the run is cut short."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hawqtool.errors import HawqError, InputLostError, ResourceError, UsageError, disk_errors
from hawqtool.export.manifest import file_hash
from hawqtool.pipeline.run.checkpoints import Checkpoints
from hawqtool.pipeline.run.files import PART
from hawqtool.runtime.reporter import Reporter
from hawqtool.streaming.offload import FOLDER_PREFIX

REMOVED = ".removed"
"""Ending of a folder that is being removed."""


_IDENTITY, _ROWS, _STARTS, _SHIPPED = "identity", "rows", "starts", "shipped"
_COPY = "copy"
_BOOKKEEPING = {prefix + key for key in (_IDENTITY, _ROWS, _STARTS) for prefix in ("", f"{_COPY}.")}
_KEPT_IN = "the finished work is kept in"
_SHOWN_CHARACTERS = 40


class RunFolder:
    """``.OUT.hawqtool`` while a run into ``OUT`` lasts, and afterwards if it did not finish; a context manager.

    It holds ``lock``, which the system frees when the process dies, ``saved/`` (finished work), ``plans/`` (written
    checkpoints), hidden states that memory does not hold and, while the output is put in place, ``replaced/`` (the
    output that was there). Leaving the block removes it, unless the run was cut short and something was saved; then
    the exception gets a note that says so.

    Args:
        output: Folder or file that the run makes.
        reporter: Is told of damaged parts, and what becomes of an unfinished run.

    Raises:
        UsageError: If another run into the same output is under way, or a link has the folder's name.
        ResourceError: If the folder cannot be made.
    """

    def __init__(self, output: Path, reporter: Reporter) -> None:
        self.output, self._reporter = output, reporter
        self.path = output.with_name(f".{output.name}.hawqtool")
        self.plans, self._replaced = self.path / "plans", self.path / "replaced"
        self.saved = Checkpoints(self.path / "saved", warn=reporter.warn)
        self.starts = 1
        self._lock = _Lock(self.path, output)
        self._ours = self._finished = False
        self._shipping: Path | None = None

    def __enter__(self) -> Self:
        try:
            with disk_errors(self.path.parent):
                self._lock.take()
                if self._replaced.exists() and not self.output.exists():
                    self._replaced.rename(self.output)  # a run was killed between two renames
            return self
        except BaseException:  # a signal's too, at any line, which ExitStack's own lines would let through
            self._undo()
            raise

    def _undo(self) -> None:
        """Remove a folder that a signal left half made, unless there is work in it or another run has it."""
        with suppress(HawqError, OSError):
            self._lock.release()  # it may be half taken, and must be whole for what follows
            self._lock.take()
            if not self.unfinished:
                self._remove()
        self._lock.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or self.finished:
                self._remove()
                if error is not None:
                    error.add_note(f"{self.output} is complete")
            elif not self._ours:
                if self.in_place or not self.unfinished:
                    self._remove()
                elif not isinstance(error, UsageError):
                    error.add_note(f"{_KEPT_IN} {self.path}; the same command goes on with it")
            elif self._can_go_on(error):
                error.add_note(f"{_KEPT_IN} {self.path}; the same command goes on with it")
            else:
                self._remove()
        finally:
            self._lock.release()

    def _can_go_on(self, error: BaseException) -> bool:
        """Whether something was saved and the error is none that would come again."""
        again = isinstance(error, HawqError) and not isinstance(error, (ResourceError, InputLostError))
        return not again and bool(set(self.saved.keys()) - _BOOKKEEPING)

    @property
    def unfinished(self) -> bool:
        """Whether the folder holds what an earlier run saved."""
        return self.saved.has(_IDENTITY) or self.saved.part(_COPY).has(_IDENTITY)

    @property
    def finished(self) -> bool:
        """Whether the output is in place."""
        moved = self._shipping is not None and not self._shipping.exists() and self.output.exists()
        return self._finished or moved

    def begin(self, identity: dict[str, Any], restart: bool) -> None:
        """Go on with the unfinished run, if there is one, or remove what it left and start anew.

        Args:
            identity: What must be equal for a run to be the same, by name.
            restart: Whether to start anew.

        Raises:
            UsageError: If the unfinished run was another one; names what differs, with both values.
        """
        for folder in self.path.glob(f"{FOLDER_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(folder, ignore_errors=True)
        known = None if restart else self._kept(_IDENTITY)
        if known is not None:
            self._require(known, identity)
            self.starts = (self._kept(_STARTS) or 1) + 1
            self._clean()
            self._reporter.say(f"going on with the unfinished run in {self.path}")
        else:
            if self.unfinished:
                self._reporter.say(f"the unfinished run into {self.output} was removed")
            self.begin_anew(identity)

    def begin_anew(self, identity: dict[str, Any], keep: Sequence[str] = ()) -> None:
        """Remove what was saved and written, but for some keys, and begin another run."""
        kept = {key: self.saved.load(key) for key in keep}
        self._ours = True
        with disk_errors(self.path):
            for folder in (self.saved.folder, self.plans, self._replaced):
                if folder.exists():
                    shutil.rmtree(folder)
            self.saved.folder.mkdir()
            self.plans.mkdir()
        for key, content in ((key, content) for key, content in kept.items() if content is not None):
            self.saved.save(key, content)
        self._keep(_STARTS, self.starts)
        self._keep(_IDENTITY, identity)  # last, as it makes the rest an unfinished run

    def check_rows(self, fingerprints: dict[str, str]) -> None:
        """Check that the rows are those of the unfinished run; from here on what is saved belongs to this run.

        Raises:
            UsageError: If they differ; says both fingerprints.
        """
        known, fingerprints = self._kept(_ROWS), {f"{role} rows": found for role, found in fingerprints.items()}
        if known is None:
            self._keep(_ROWS, fingerprints)
        else:
            self._require(known, fingerprints)
            self._keep(_STARTS, self.starts)
        self._ours = True

    def _keep(self, key: str, content: Any) -> None:
        """Keep what tells runs apart, and a copy: if it is damaged, nothing else could be believed."""
        self.saved.part(_COPY).save(key, content)
        self.saved.save(key, content)

    def _kept(self, key: str) -> Any:
        known = self.saved.load(key)
        return self.saved.part(_COPY).load(key) if known is None else known

    def _require(self, known: dict[str, Any], found: dict[str, Any]) -> None:
        names = [*known, *(name for name in found if name not in known)]
        differences = [
            f"{name} was {_shown(known.get(name))}, is {_shown(found.get(name))}"
            for name in names
            if known.get(name) != found.get(name)
        ]
        if differences:
            raise UsageError(
                f"the unfinished run in {self.path} was another one: {'; '.join(differences)}; give what it was given, "
                "or --restart to remove it and start anew"
            )

    def _clean(self) -> None:
        """Remove what a killed run had half written or half removed."""
        with disk_errors(self.path):
            for path in (*self.saved.folder.glob(f"*{PART}"), *self.plans.glob(f"*{REMOVED}")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def ship(self, folder: Path) -> None:
        """Rename a complete folder below this one to the output; an output that it replaces comes back on failure."""
        self._keep(_SHIPPED, _report_hash(folder))
        with disk_errors(self.output):
            if self.output.exists():
                self.output.rename(self._replaced)
            self._shipping = folder
            try:
                folder.rename(self.output)
            finally:
                if self._replaced.exists() and not self.output.exists():
                    self._replaced.rename(self.output)

    @property
    def in_place(self) -> bool:
        """Whether an earlier run was killed after it had put its output in place."""
        shipped = self._kept(_SHIPPED)
        return shipped is not None and shipped == _report_hash(self.output)

    def finish(self) -> None:
        """The output is in place: nothing needs to be kept."""
        self._finished = True

    def _remove(self) -> None:
        """Remove the folder, the lock last: who waits for it must not find a folder that is half removed."""
        for path in self.path.iterdir():
            if path.name != "lock":
                shutil.rmtree(path, ignore_errors=True)
        (self.path / "lock").unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()


class _Lock:
    """``lock`` in a folder, which the system frees when the process dies.

    Args:
        folder: Is made where it is missing.
        output: What the lock is for, by which errors name it.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        # An attribute from the moment the file is open, so that a signal at any moment leaves what `release` needs.
        self._descriptor: int | None = None

    def take(self) -> None:
        """Make the folder and lock it for this process.

        Raises:
            UsageError: If another run has the lock, or the folder is a link.
            OSError: If the folder cannot be made or written.
        """
        while self._descriptor is None:
            self.folder.mkdir(exist_ok=True)
            if self.folder.is_symlink():
                raise UsageError(
                    f"{self.folder} is a link, expected a folder of our own; remove it or choose another --output"
                )
            # The run that had the folder may have just removed it.
            with suppress(FileNotFoundError):
                self._descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
                if not self._took(self._descriptor):
                    self.release()

    def release(self) -> None:
        """Free the lock, as far as it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _took(self, descriptor: int) -> bool:
        """Lock an open file; whether it is the folder's lock still, which a run that ends removes."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace") or "unknown"
            raise UsageError(
                f"another run into {self.output} is under way (process {holder}); "
                "wait for it, or choose another --output"
            ) from None
        try:
            current = os.stat(self.folder / "lock").st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False
        if current:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return current


def _report_hash(folder: Path) -> str | None:
    """SHA-256 of an output's report, which no other run wrote: it has times in it. None where there is no report."""
    try:
        return file_hash(folder / "report.json")
    except OSError:
        return None


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
