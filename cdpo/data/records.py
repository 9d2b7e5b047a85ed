"""Files to records, one JSON object each, with file and line. Coerces nothing, and skips nothing but blank lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cdpo.data.rows import BadRow
from cdpo.errors import ConfigError, DataError

BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """`value` is a dict of columns, or the reason why there is none. `source` is "file:line", from 1."""

    source: str
    value: dict[str, Any] | BadRow


def read(path: Path) -> Iterator[Record]:
    """The records of a .jsonl, .json or .parquet file, each also .gz. ConfigError for another type."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}.get(suffix)
    if reader is None:
        raise ConfigError(f"dataset.path={path}: unknown file type; use .jsonl, .json or .parquet, each also .gz")
    return reader(path)


def read_object(path: Path) -> dict[str, Any]:
    """The one object that a .json file (also .gz) holds. ConfigError if there is none, DataError if not JSON."""
    require_file(path)
    try:
        with _open(path) as file:
            value = parse(file.read().removeprefix(BOM))
    except (EOFError, OSError) as error:
        value = _unreadable(error)
    if isinstance(value, BadRow):
        raise DataError(f"{path.name}: {value}")
    return value


def require_file(path: Path) -> None:
    """Raise ConfigError if there is none."""
    if not path.is_file():
        raise ConfigError(f"dataset.path={path}: no such file; a relative path starts at the current directory")


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """One JSON value and where it ends. BadRow also for what json lets pass: duplicate keys, NaN, lone surrogates.

    The BadRow carries `end`, so that the next value can be read.
    """
    found: list[BadRow] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            found.append(BadRow("duplicate_key", f"the key {twice!r} stands there twice; keep one"))
        return seen

    def constant(name: str) -> float:
        found.append(BadRow("number", f"{name} is not a JSON number; give a finite number or delete the row"))
        return 0.0

    # strict=False: control characters, NUL among them, are text and no damage
    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant, strict=False)
    value, end = decoder.raw_decode(text, start)
    if not found and _has_lone_surrogate(text[start:end], value):
        found.append(BadRow("encoding", "a lone surrogate (half of a \\uD8xx\\uDCxx pair) is no character; delete it"))
    if found:
        found[0].end = end
        raise found[0]
    return value, end


def _has_lone_surrogate(text: str, value: Any) -> bool:
    if "\\ud" not in text.lower():  # only an escape can spell one
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def parse(raw: bytes, at_end: bool = False) -> dict[str, Any] | BadRow:
    """One line as an object. `at_end`: no line break follows, so the file may have been truncated here."""
    try:
        text = raw.decode().strip()
        value, end = decode(text)
        if end != len(text):
            raise json.JSONDecodeError("more text after the object", text, end)
    except BadRow as problem:
        return problem
    except UnicodeDecodeError as error:
        return BadRow("encoding", f"not UTF-8 (byte {error.start + 1}: {error.reason}); save the file as UTF-8")
    except RecursionError:
        return BadRow("json", "not valid JSON (nested too deeply); mend or delete the line")
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        hint = (
            "the file ends here: truncated? Copy it again or delete the line" if at_end else "mend or delete the line"
        )
        return BadRow("json", f"not valid JSON ({why}); {hint}")
    return _object(value)


def _object(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("type", f"a row must be an object with named columns, not {type(value).__name__}")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _unreadable(error: Exception) -> BadRow:
    return BadRow("file", f"the file cannot be read on from here ({error}); it is damaged or truncated: copy it again")


def _jsonl(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                raw = line.removeprefix(BOM) if number == 1 else line
                if raw.strip():
                    yield Record(f"{path.name}:{number}", parse(raw, at_end=not raw.endswith(b"\n")))
    except (EOFError, OSError) as error:  # a gzip stream that is cut or damaged
        yield Record(f"{path.name}:{number + 1}", _unreadable(error))


def _json(path: Path) -> Iterator[Record]:
    """A list of objects; the line is where the object starts."""
    line = 1
    try:
        with _open(path) as file:
            text = file.read().removeprefix(BOM).decode()
        at, seen = _skip(text, 0), 0
        if at == len(text):
            return
        if text[at] != "[":
            raise ValueError("a .json file must hold a list of objects; for one object per line name it .jsonl")
        at = _skip(text, at + 1)
        while text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            seen = at
            try:
                value, end = decode(text, at)
                yield Record(f"{path.name}:{line}", _object(value))
            except BadRow as problem:
                end = problem.end
                yield Record(f"{path.name}:{line}", problem)
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise ValueError("no comma and no closing bracket after the object")
        if _skip(text, at + 1) < len(text):
            raise ValueError("more text after the closing bracket")
    except (EOFError, OSError, ValueError, RecursionError) as error:
        yield Record(f"{path.name}:{line}", _unreadable(error))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with _open(path) as file:
            table = parquet.ParquetFile(BytesIO(file.read()) if path.suffix == ".gz" else file)
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{path.name}:{number}", value)
    except (EOFError, OSError, ValueError, pyarrow.ArrowException) as error:
        yield Record(f"{path.name}:{number + 1}", _unreadable(error))
