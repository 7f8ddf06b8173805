"""Where the checkpoint comes from: a folder, or a model hub that it is fetched from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hawqtool.checkpoint.companions import left_folders
from hawqtool.checkpoint.index import no_config
from hawqtool.checkpoint.links import check_links
from hawqtool.errors import InputError, NumericalError, one_line
from hawqtool.parsing import ParseError, load_json, short

MAY_FETCH = "HAWQTOOL_MAY_FETCH"
"""Environment variable that says that HF_HUB_OFFLINE is the command line's default, not the user's wish."""

ALLOW_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
IGNORE_PATTERNS = (
    "[!0-9a]*/*",  # original/, onnx/ and the like; modules of sentence encoders are 1_Pooling/, 2_Dense/ ...
    "[0-9][!0-9_]*/*",
    "a[!d]*/*",  # ... and additional_chat_templates/ holds named chat templates
    "adapter*/*",
    "*/*/*",
    "consolidated*",
    "model.*.safetensors",  # variants such as model.fp16.safetensors
    "model-*.*.safetensors",
)


@dataclass(frozen=True)
class ResolvedModel:
    """A checkpoint on this machine.

    Args:
        folder: Holds config.json and the weights.
        name: Name for people: the folder's last part, or ``org/name``.
        revision: Commit that was fetched from the hub; None for a folder.
        runs_code: Whether code that the checkpoint brings along is executed to build the model.
    """

    folder: Path
    name: str
    revision: str | None = None
    runs_code: bool = False

    @property
    def spec(self) -> str:
        """What finds the same checkpoint again, without the folders of a path: ``org/name@commit``, or the name."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def warnings(self) -> list[str]:
        """What the user must know of where the model comes from."""
        found = []
        if self.runs_code:
            found.append(f"--trust-remote-code: code that {self.spec} brings along was executed on this machine")
        folders = left_folders(self.folder)
        if folders:
            found.append(f"folders of the source that are not copied: {short(', '.join(folders))}")
        if (self.folder / "adapter_config.json").is_file():
            found.append("the source's adapter_config.json is not copied: its adapter is no part of the weights")
        return found


def hub_id(spec: str) -> tuple[str, str | None] | None:
    """Repository and revision of ``org/name[@revision]`` where that is not an existing folder; None for all else."""
    if os.path.exists(spec):  # unlike Path.exists, false for names that no file can have
        return None
    repository, _, revision = spec.partition("@")
    if repository.count("/") != 1 or ("@" in spec and not revision):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return repository, revision or None


def require_model(spec: str) -> None:
    """Refuse what is neither a folder nor a hub id; nothing is fetched.

    Raises:
        InputError: If it is neither.
    """
    if spec.endswith(".gguf") and not os.path.isdir(spec):
        found = "is a GGUF file" if os.path.isfile(spec) else "does not exist"
        raise InputError(f"{short(spec)} {found}; expected a checkpoint: a folder or a hub id org/name[@revision]")
    if hub_id(spec) is None and not os.path.isdir(spec):
        raise InputError(
            f"{short(spec)} is not a folder; expected one with config.json and safetensors files, or a hub id "
            "org/name[@revision]; check the path"
        )


def locate(spec: str) -> ResolvedModel:
    """The checkpoint that a folder or a hub id names; what is not in the hub's cache is fetched.

    Args:
        spec: A folder, which wins, or ``org/name[@revision]``.

    Raises:
        InputError: If there is no such folder or repository, it cannot be reached, or a link leaves the folder.
        NumericalError: If the disk refuses the download.
    """
    require_model(spec)
    found = hub_id(spec)
    if found is None:
        folder = Path(spec)
        check_links(folder)
        return ResolvedModel(folder, folder.absolute().name)
    folder = _fetch(*found)
    check_links(folder)
    # A snapshot's folder has the name of its commit.
    return ResolvedModel(folder, found[0], folder.name)


def resolve_model(spec: str, trust_remote_code: bool = False) -> ResolvedModel:
    """`locate` a checkpoint that is to be built, and decide whether code that it brings along is executed.

    Raises:
        InputError: As `locate`; or if its config.json cannot be used, or it needs code that is not trusted.
        NumericalError: As `locate`.
    """
    found = locate(spec)
    return replace(found, runs_code=_runs_code(found.folder, trust_remote_code))


def _fetch(repository: str, revision: str | None) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with online():
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=[*ALLOW_PATTERNS], ignore_patterns=[*IGNORE_PATTERNS]
            )
    except (HTTPError, OfflineModeIsEnabled, FileNotFoundError) as error:
        raise InputError(_reason(repository, revision, error)) from error
    except OSError as error:
        raise NumericalError(
            f"{repository} cannot be stored in the hub's cache ({error.strerror or one_line(error)}); "
            "free some space or set HF_HOME to another folder"
        ) from error
    return Path(folder)


@contextmanager
def online() -> Iterator[None]:
    """Lift the command line's default of staying offline, never a setting of the user's."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if os.environ.get(MAY_FETCH):
        constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reason(repository: str, revision: str | None, error: Exception) -> str:
    """One line for a download that failed; the hub's own messages have several."""
    from huggingface_hub import constants, errors

    wanted = f"{repository}@{revision}" if revision else repository
    status = getattr(getattr(error, "response", None), "status_code", None)
    access = "accept its terms on the hub and log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated and this account may not read it; {access}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'}; expected a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repository} is neither a folder nor a repository that the hub shows us; check the name, or {access}"
    if status in (401, 403):
        return f"the hub refuses {repository} ({status}); {access}"
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"the cached copy of {wanted} is incomplete and the hub cannot be reached; download it with a network"
    offline = isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
    if offline:
        return f"{wanted} is no folder and not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it; unset that"
    cause = error.__cause__ or error
    return (
        f"{wanted} is no folder, and the hub at {constants.ENDPOINT} cannot be reached "
        f"({type(cause).__name__}: {one_line(cause)}); check the network, or give a folder"
    )


def _runs_code(folder: Path, trusted: bool) -> bool:
    """Whether code of the checkpoint is executed to build it.

    Raises:
        InputError: If transformers does not know the model, unless the checkpoint brings code that is trusted.
    """
    config = _config(folder)
    mapped = config.get("auto_map")
    brings_code = isinstance(mapped, dict) and bool(mapped.keys() & {"AutoConfig", "AutoModelForCausalLM"})
    if brings_code and trusted:
        return True
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        does_not_know = f"{folder.name}: transformers {transformers.__version__} does not know model type {kind!r}"
        if brings_code:
            raise InputError(
                f"{does_not_know}, and the checkpoint brings its own code; "
                "read that code, then allow it with --trust-remote-code"
            )
        raise InputError(f"{does_not_know} of config.json; expected one that it knows; try a newer transformers")
    return trusted and isinstance(_read(folder / "tokenizer_config.json").get("auto_map"), dict)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise no_config(folder)
    try:
        config = load_json(path)
    except ParseError as error:
        raise InputError(f"{path} is not a JSON object that describes a model ({error}); download it again") from None
    if not isinstance(config, dict) or not config:
        raise InputError(f"{path} is not a JSON object that describes a model; download it again")
    return config


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none."""
    try:
        content = load_json(path)
    except ParseError:
        return {}
    return content if isinstance(content, dict) else {}
