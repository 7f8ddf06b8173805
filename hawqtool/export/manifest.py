"""Manifest of an output folder: every file with size and hash, and what a changed folder differs in.

``reproduce/manifest.json`` and ``report.json`` hold a hash of each other, so that an edit of either shows. The hashes
are no signature: who rewrites all of them consistently is found only by a comparison with the source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hawqtool.checkpoint.companions import companion_files
from hawqtool.checkpoint.index import INDEX_FILE, CheckpointIndex, read_header, read_index
from hawqtool.errors import InputError, disk_errors
from hawqtool.parsing import MAX_RECORD_BYTES, MAX_RECORD_VALUES, ParseError, load_json
from hawqtool.report.schema import Report

MANIFEST_FILE = "reproduce/manifest.json"
MANIFEST_SCHEMA = "hawqtool.manifest/1"
CONFIG_FILE, REPORT_FILE = "config.json", "report.json"

Entry = dict[str, Any]
"""What the manifest says of a file."""

FREE_FILES = ("README.md", "report.html", ".gitattributes")
"""Files that may be edited, removed or added: the card is for its author, the page is drawn from the report again, and
the hub adds the last one."""

FREE_FOLDERS = (".git", ".cache")
"""What git and the hub's client keep beside the files."""

_RECORDS = ("manifest.json", "plan.json", "checksums.json", "config.yaml", "sensitivity.json", "packages.json")
_COSTS = ("costs.csv", "costs.json")
_LENGTH_BYTES = 8
_THREADS = 4


def seal(folder: Path, report: Report, hashed: Mapping[str, Entry] | None = None) -> Report:
    """Write the manifest of a complete folder, then ``report.json`` with the hash of the manifest.

    Args:
        folder: All files of the output but these two and `FREE_FILES` are in it.
        report: The report's content.
        hashed: What `weight_entries` gave since the weights are complete; None hashes them now.

    Returns:
        The report as it was written, with ``manifest``.

    Raises:
        ResourceError: If a file cannot be read or written.
    """
    with disk_errors(folder):
        names = [name for name in files_below(folder) if name not in (MANIFEST_FILE, REPORT_FILE, *FREE_FILES)]
        entries = _entries(folder, [name for name in names if name not in (hashed or {})]) | dict(hashed or {})
        manifest = {
            "schema": MANIFEST_SCHEMA,
            "files": {name: entries[name] for name in names},
            "config": _key_hashes(load_json(folder / CONFIG_FILE)),
            "report": content_hash({key: value for key, value in report.items() if key != "manifest"}),
        }
        _write(folder / MANIFEST_FILE, manifest)
        sealed: Report = {**report, "manifest": {"file": MANIFEST_FILE, "sha256": file_hash(folder / MANIFEST_FILE)}}
        _write(folder / REPORT_FILE, sealed)
    return sealed


def weight_entries(folder: Path) -> dict[str, Entry]:
    """The manifest's entries of the files of weights in a folder, by name; hashing them takes a second a gigabyte."""
    return _entries(folder, [path.name for path in sorted(folder.glob("*.safetensors"))])


def files_below(folder: Path) -> tuple[str, ...]:
    """Files of a folder and of the folders in it by relative name, sorted; links to folders count as files."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [n for n in folders if n not in links and not (here == folder and n in FREE_FOLDERS)]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return tuple(sorted(found))


def is_manifest(content: Any) -> bool:
    """Whether a JSON value has the fields of a manifest."""
    if not isinstance(content, dict) or content.get("schema") != MANIFEST_SCHEMA:
        return False
    files, config = content.get("files"), content.get("config")
    return (
        isinstance(files, dict)
        and all(isinstance(entry, dict) for entry in files.values())
        and isinstance(config, dict)
        and isinstance(content.get("report"), str)
    )


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files of an output, as its manifest has them; empty where there is no manifest."""
    try:
        found = load_json(folder / MANIFEST_FILE)
    except ParseError:
        return {}
    files = found["files"] if is_manifest(found) else {}
    return {name: str(entry.get("sha256")) for name, entry in files.items() if name.endswith(".safetensors")}


def unlisted_files(folder: Path) -> tuple[str, ...]:
    """Files of an output that its manifest does not list, but for `FREE_FILES`; all of them where there is none."""
    try:
        found = load_json(folder / MANIFEST_FILE)
    except ParseError:
        found = None
    listed = found["files"] if is_manifest(found) else {}
    own = {MANIFEST_FILE, REPORT_FILE, *FREE_FILES, *listed}
    return tuple(name for name in files_below(folder) if name not in own)


def manifest_problems(folder: Path, index: CheckpointIndex, manifest: Mapping[str, Any], hash_all: bool) -> list[str]:
    """Differences between a folder and its manifest, one line each.

    Args:
        folder: The output.
        index: Headers of its weights.
        manifest: Content of ``reproduce/manifest.json``.
        hash_all: Whether the data of the weights is hashed too; checksums by tensor say the same, and which tensor.
    """
    listed = manifest["files"]
    problems = _report_problems(folder, manifest)
    weights = {file.name for file in index.files}
    present = [name for name in files_below(folder) if name not in (MANIFEST_FILE, REPORT_FILE, *FREE_FILES)]
    problems += [f"{name} is missing; {MANIFEST_FILE} lists it; restore it" for name in listed if name not in present]
    for name in present:
        if name not in listed:
            problems.append(f"{name} is not in {MANIFEST_FILE}; expected no further file; remove it")
        elif not (folder / name).is_file():
            problems.append(f"{name} is no regular file; expected one; restore it")
        elif name in weights and not hash_all:
            problems += _header_problems(folder / name, listed[name])
        elif name == CONFIG_FILE:
            problems += _config_problems(folder / name, listed[name], manifest["config"])
        elif file_hash(folder / name) != listed[name].get("sha256"):
            problems.append(f"{name} differs from its SHA-256 in {MANIFEST_FILE}; it changed; restore it")
    return problems


def first_damage(folder: Path) -> str | None:
    """The first thing in which an output differs from its manifest, every byte of the weights included.

    None where nothing does. What no manifest can be read of is damaged too.
    """
    try:
        manifest = load_json(folder / MANIFEST_FILE)
        index = read_index(folder)
    except (ParseError, InputError) as error:
        return str(error)
    if not is_manifest(manifest):
        return f"{MANIFEST_FILE} is no manifest"
    try:
        problems = manifest_problems(folder, index, manifest, hash_all=True)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return problems[0] if problems else None


def source_file_problems(folder: Path, source: Path, index: CheckpointIndex) -> list[str]:
    """Small files that differ from the source's, and files that neither the source nor hawqtool has."""
    copied = companion_files(source)
    problems = []
    for name in copied:
        if name in FREE_FILES:
            continue
        if not (folder / name).is_file():
            problems.append(f"{name} of the source is missing; expected a copy; restore it")
        elif (folder / name).read_bytes() != (source / name).read_bytes():
            problems.append(f"{name} differs from the source's; expected equal bytes; restore it")
    own = {CONFIG_FILE, REPORT_FILE, INDEX_FILE, *FREE_FILES, *(file.name for file in index.files)}
    own |= {f"reproduce/{name}" for name in (*_RECORDS, *_COSTS)}
    unknown = [name for name in files_below(folder) if name not in own and name not in copied]
    return problems + [f"{name} is neither in the source nor a file of hawqtool; remove it" for name in unknown]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entries(folder: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Entries of files by name; several are hashed at a time."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "manifest") as pool:
        return dict(zip(names, pool.map(_entry, (folder / name for name in names)), strict=True))


def _entry(path: Path) -> Entry:
    entry: Entry = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    if path.suffix == ".safetensors":
        tensors = {info.name: [info.dtype, list(info.shape)] for info in read_header(path)}
        entry |= {"header_sha256": _header_hash(path), "tensors": tensors}
    return entry


def _header_hash(path: Path) -> str:
    with path.open("rb") as stream:
        prefix = stream.read(_LENGTH_BYTES)
        return hashlib.sha256(prefix + stream.read(int.from_bytes(prefix, "little"))).hexdigest()


def _header_problems(path: Path, entry: Mapping[str, Any]) -> list[str]:
    """Of a file of weights, from its header alone."""
    expected = entry.get("tensors")
    found = {info.name: [info.dtype, list(info.shape)] for info in read_header(path)}
    if isinstance(expected, dict) and set(found) == set(expected):
        changed = [name for name, kind in found.items() if kind != expected[name]]
        if changed:
            return [
                f"tensor {name} is {found[name][0]} {found[name][1]}; {MANIFEST_FILE} says {expected[name]}; "
                f"the header of {path.name} changed; restore it"
                for name in changed
            ]
    if path.stat().st_size != entry.get("bytes") or _header_hash(path) != entry.get("header_sha256"):
        return [f"the header or the size of {path.name} differs from {MANIFEST_FILE}; it changed; restore it"]
    return []


def _config_problems(path: Path, entry: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys of ``config.json`` that changed; one line on the file where its text alone did."""
    if file_hash(path) == entry.get("sha256"):
        return []
    try:
        found = _key_hashes(load_json(path))
    except ParseError as error:
        return [f"{CONFIG_FILE} is not readable JSON ({error}); restore it"]
    changed = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    where = f": {', '.join(changed)}" if changed else ""
    return [f"{CONFIG_FILE} differs from its SHA-256 in {MANIFEST_FILE}{where}; it changed; restore it"]


def _report_problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Whether the report and the manifest still belong together."""
    try:
        report = load_json(folder / REPORT_FILE, MAX_RECORD_BYTES, MAX_RECORD_VALUES)
    except ParseError as error:
        return [f"{REPORT_FILE} is missing or not readable JSON ({error}); restore it"]
    if not isinstance(report, dict):
        return [f"{REPORT_FILE} is not a JSON object; expected a report; restore it"]
    named = report.pop("manifest", None)
    problems = []
    if not isinstance(named, dict) or named.get("sha256") != file_hash(folder / MANIFEST_FILE):
        problems.append(f"{MANIFEST_FILE} differs from its SHA-256 in {REPORT_FILE}; one of them changed; restore it")
    if content_hash(report) != manifest["report"]:
        problems.append(f"{REPORT_FILE} differs from its SHA-256 in {MANIFEST_FILE}; it changed; restore it")
    return problems


def _key_hashes(config: Any) -> dict[str, str]:
    return {key: content_hash(value) for key, value in config.items()} if isinstance(config, dict) else {}


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the layout of its text."""
    # Twice: keys that are numbers become texts on the way, and are sorted as such afterwards.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
