"""From a composed config to objects: a dataclass is the schema of its node.

Unknown keys (with + too), wrong types and out-of-range values are ConfigErrors that name the key and what is valid.
Imports no torch: `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo.config.schema import Config
from cdpo.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf/config.yaml").is_file())  # wheel, or checkout


def build(composed: Mapping[str, Any]) -> Config:
    """Build every object of a composed, resolved config; models and data are described, not loaded.

    Raises ConfigError for the first node that cannot be built, with the path of its key.
    """
    allow = ["cdpo.", *composed.get("allow_targets", [])]
    return _construct(Config, composed, "", allow)


def _built(node: Any, where: str, allow: Sequence[str], wanted: Any = Any) -> Any:
    """A node with `_target_` becomes that object, one for a dataclass that dataclass, anything else itself."""
    if isinstance(node, Mapping) and "_target_" in node:
        return _construct(_target(node["_target_"], where, allow), node, where, allow)
    if isinstance(node, Mapping) and dataclasses.is_dataclass(wanted):
        return _construct(wanted, node, where, allow)
    if isinstance(node, Mapping):
        return {key: _built(value, f"{where}.{key}", allow) for key, value in node.items()}
    return node


def _target(name: Any, where: str, allow: Sequence[str]) -> Any:
    """The class that `_target_` names, if its prefix is allowed."""
    if not isinstance(name, str) or not name.startswith(tuple(allow)):
        raise ConfigError(f"{where}._target_={name!r} is not under {', '.join(allow)}; see allow_targets")
    module, _, cls = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_={name!r} does not exist") from error
    if not inspect.isclass(found) or not dataclasses.is_dataclass(found):
        raise ConfigError(f"{where}._target_={name!r} is not a dataclass")
    return found


def _construct(cls: Any, node: Mapping[str, Any], where: str, allow: Sequence[str]) -> Any:
    """`cls(**node)` after its keys and types were checked; a ValueError of the class gets the key's path."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    given = {str(key): value for key, value in node.items() if key != "_target_"}
    prefix = f"{where}." if where else ""
    for key in given.keys() - fields.keys():
        raise ConfigError(
            f"unknown key {prefix}{key}{did_you_mean(key, fields)}; {cls.__name__} knows {', '.join(fields)}"
        )
    built = {key: _built(value, prefix + key, allow, hints[key]) for key, value in given.items()}
    try:
        return cls(**_typed(cls, hints, built, prefix))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where or 'config'}: {error}") from error


def _typed(cls: Any, hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values, checked against the annotations without coercion (an int may stand for a float)."""
    import pydantic

    checked = {}
    for key, value in values.items():
        options = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
        if isinstance(value, list) and typing.get_origin(hints[key]) is tuple:
            value = tuple(value)
        hint = Any if _is_interface(hints[key]) or dataclasses.is_dataclass(value) else hints[key]
        try:
            checked[key] = pydantic.TypeAdapter(hint, config=options).validate_python(value)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise ConfigError(f"{prefix}{key}={value!r}: {problem[0].lower()}{problem[1:]}") from None
        except pydantic.PydanticUserError:  # a dataclass has no `config` to be given: it was built above
            raise ConfigError(f"{prefix}{key}={value!r}: input should be a section with keys") from None
    return checked


def _is_interface(hint: Any) -> bool:
    """Protocols and containers of them: their values were built from `_target_` nodes already."""
    parts = [hint, *typing.get_args(hint)]
    return any(getattr(part, "_is_protocol", False) for part in parts)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" if a known name is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
