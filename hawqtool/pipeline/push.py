"""The ``push`` command: a verified output folder goes to a model hub."""

from __future__ import annotations

from pathlib import Path

from hawqtool import __version__
from hawqtool.checkpoint.source import online
from hawqtool.errors import InputError, UsageError, one_line
from hawqtool.export.verify import verify_folder
from hawqtool.parsing import short
from hawqtool.report.documents import PushDocument

STALE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*.pth")
"""Weights that an earlier upload left; loaders would take them for ours."""


def run_push(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> PushDocument:
    """``hawqtool push``: verify a folder and upload all of its files in one commit.

    Weights that the repository has and the folder has not are removed by the same commit.

    Args:
        folder: What ``hawqtool quantize`` wrote.
        repository: ``org/name``; created where it is missing.
        private: Create it private; an existing one must be private already.
        revision: Branch, created where it is missing; None for main.

    Raises:
        UsageError: If the name is none of a repository, or the repository is public and should be private.
        InputError: If ``verify`` finds a problem, or the hub refuses or cannot be reached.
    """
    _check_name(repository)
    report = verify_folder(folder, None)
    if report.problems:
        raise InputError(
            f"{folder} has {len(report.problems)} problems, first: {report.problems[0]}; nothing was uploaded, "
            "hawqtool verify lists them all"
        )
    files = [path for path in folder.rglob("*") if path.is_file()]
    with online():
        commit, url = _upload(folder, repository, private, revision or "main")
    return {
        "schema": "hawqtool.push/1",
        "repository": repository,
        "revision": revision or "main",
        "commit": commit,
        "url": url,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    advice = "expected org/name, such as my-org/my-model"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{short(repository)} is no name of a repository ({one_line(error)}); {advice}") from error
    if repository.count("/") != 1:
        raise UsageError(f"{short(repository)} is no name of a repository; {advice}")


def _upload(folder: Path, repository: str, private: bool, revision: str) -> tuple[str, str]:
    from httpx import HTTPError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(endpoint=constants.ENDPOINT, library_name="hawqtool", library_version=__version__)
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UsageError(
                f"{repository} exists and is public; make it private on the hub first, or leave out --private"
            )
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload by hawqtool {__version__}",
            delete_patterns=[*STALE_PATTERNS],
        )
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(_reason(repository, error)) from error
    return done.oid, str(url)


def _reason(repository: str, error: Exception) -> str:
    """One line for an upload that failed; a commit is all or nothing, so nothing of it stands there."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repository}: HF_HUB_OFFLINE forbids the upload; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"{repository}: the hub does not know who asks; log in with `hf auth login`, or set HF_TOKEN"
    if status is not None:
        return (
            f"the hub refuses the upload to {repository} ({status}: {one_line(error)}); expected a token that may "
            "write there; check the name and the token"
        )
    return (
        f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {one_line(error)}); "
        "check the network and push again"
    )
