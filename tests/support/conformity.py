"""Whether a JSON document is what its type says."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

_PLAIN = {str: str, int: int, float: (int, float), bool: bool, type(None): type(None)}


def differences(value: Any, hint: Any, place: str = "document") -> list[str]:
    """What differs from a type made of typed dictionaries, lists, dicts, unions and plain types."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return []
    if origin in (Annotated, NotRequired):
        return differences(value, arguments[0], place)
    if origin in (Union, types.UnionType):
        return [] if any(not differences(value, kind) for kind in arguments) else [f"{place}: {value!r}"]
    if origin is Literal:
        return [] if value in arguments else [f"{place}: {value!r}"]
    if is_typeddict(hint):
        return _of_keys(value, hint, place)
    if origin is list and isinstance(value, list | tuple):
        return [text for n, part in enumerate(value) for text in differences(part, arguments[0], f"{place}[{n}]")]
    if origin in (dict, Mapping) and isinstance(value, dict):
        return [text for key, part in value.items() for text in differences(part, arguments[1], f"{place}.{key}")]
    fits = hint in _PLAIN and isinstance(value, _PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
    return [] if fits else [f"{place}: {value!r} is no {hint}"]


def _of_keys(value: Any, kind: Any, place: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{place}: {value!r} is no object"]
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired} | kind.__optional_keys__
    found = [f"{place}.{name} is unknown" for name in value.keys() - hints.keys()]
    found += [f"{place}.{name} is missing" for name in hints.keys() - value.keys() - optional]
    shared = value.keys() & hints.keys()
    return found + [text for name in shared for text in differences(value[name], hints[name], f"{place}.{name}")]
