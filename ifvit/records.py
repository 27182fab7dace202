"""Records of files and recipes: dataclasses that are checked once, when they are built or parsed.

Files come from strangers. Every reader of JSON, JSON lines or YAML parses through this module, so
that the code behind it meets only records with the right keys, types, ranges, names and hashes.
"""

import codecs
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from itertools import repeat
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from ifvit.errors import UserError

SEAL = "seal"
"""Key under which a sealed file or row holds the sha256 of its other content."""
MAX_BYTES = 1 << 28
"""Largest file that is parsed as one JSON document, in bytes."""
MAX_YAML_BYTES = 1 << 20
"""Largest YAML document, in bytes; its parser takes 9 s for this."""
_MAX_NODES = 1_000_000
_MAX_INT = 2**63
_ESCAPES = re.compile(
    rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]|::")
_Record = TypeVar("_Record")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Condition of a field's value, with the words that complete "it must be ..."."""

    words: str
    holds: Callable[[Any], object]

    def __repr__(self) -> str:
        """Return the words, which `--help` shows as a part of the type."""
        return self.words


def is_sha256(value: str) -> bool:
    """Whether `value` is a sha256 as 64 lower-case hexadecimal digits."""
    return len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_plain_name(value: str) -> bool:
    """Whether `value` names a file directly in a folder: no separator, no `..`, no control code."""
    return (
        0 < len(value.encode(errors="replace")) <= 255
        and not _NOT_IN_NAMES.search(value)
        and value.strip(". ") != ""
    )


def is_relative_path(value: str) -> bool:
    """Whether `value` is a path of plain names, separated by single slashes."""
    return len(value) <= 4096 and all(map(is_plain_name, value.split("/")))


PositiveInt = Annotated[int, Rule("at least 1", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Rule("at least 0", lambda value: value >= 0)]
PositiveFloat = Annotated[float, Rule("above 0", lambda value: value > 0)]
NonNegativeFloat = Annotated[float, Rule("at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, Rule("from 0 to 1", lambda value: 0 <= value <= 1)]
Sha256 = Annotated[str, Rule("64 hexadecimal digits", is_sha256)]
PlainName = Annotated[str, Rule("a plain file name", is_plain_name)]
RelativePath = Annotated[str, Rule("a relative path without ..", is_relative_path)]


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def record(cls: type[_Record], /) -> type[_Record]:
    """Make `cls` a frozen, keyword-only dataclass whose fields are checked when it is built.

    Building one raises UserError when a field breaks the `Rule` of its annotation, when a number
    is NaN or infinite, or when an integer exceeds 64 bits. `parse_json` also refuses unknown keys
    and values of another type. A field that admits NaN or infinity has the type `object`.
    """
    owners = [cls] if "__post_init__" in cls.__dict__ else cls.__bases__
    checks = [owner.__post_init__ for owner in owners if hasattr(owner, "__post_init__")]

    def __post_init__(self: Any) -> None:  # noqa: N807
        for name, hint in field_hints(cast(Hashable, cls)).items():
            check_value(name, getattr(self, name), hint)
        for check in checks:
            check(self)

    if checks:
        __post_init__ = wraps(checks[0])(__post_init__)
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def part_of(cls: type[_Record], config: Any) -> _Record:
    """Return the configuration `cls`, all of whose fields `config` has among its own."""
    return cls(**{name: getattr(config, name) for name in field_hints(cast(Hashable, cls))})


@lru_cache(maxsize=256)
def field_hints(cls: type[Any]) -> dict[str, Any]:
    """Fields of a dataclass and their annotations, with rules."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise UserError unless all numbers are finite and all rules of the annotation hold."""
    if isinstance(value, int | float) and not (abs(value) <= _MAX_INT):
        raise UserError(f"{name} is NaN or beyond 64 bits; it must be a finite number")
    if type(hint) is type:  # a class without arguments; large files have many such values
        return
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check_value(name, value, args[0])
        for rule in args[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise UserError(f"{name} is {shorten(value)}; it must be {rule.words}")
    elif origin in (Union, UnionType):
        member = next((arg for arg in args if isinstance(value, _class_of(arg))), None)
        check_value(name, value, member)
    else:
        for item_name, item, item_hint in _items(name, value, args):
            check_value(item_name, item, item_hint)


def _items(name: str, value: Any, args: Sequence[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and annotation of what a tuple, list or mapping holds."""
    if isinstance(value, tuple | list) and args:
        hints = args if len(args) == len(value) and args[-1] is not Ellipsis else repeat(args[0])
        for number, (item, hint) in enumerate(zip(value, hints, strict=False)):
            yield f"{name}[{number}]", item, hint
    elif isinstance(value, Mapping) and len(args) == 2:
        for key, item in value.items():
            if _class_of(args[0]) is str and not isinstance(key, str):  # YAML reads 1 as a number
                raise UserError(f"{name}: the key {shorten(key)} is no text; put it in quotes")
            yield f"key of {name}", key, args[0]
            yield f"{name}.{key}", item, args[1]


def _class_of(hint: Any) -> Any:
    """Class of the values of an annotation, for isinstance; an int is a float, too."""
    if get_origin(hint) is Annotated:
        return _class_of(get_args(hint)[0])
    if hint is float:
        return float | int
    if get_origin(hint) is Literal:
        return object
    return get_origin(hint) or hint


def shorten(value: object, length: int = 80) -> str:
    """`value` as printable text of at most `length` characters, for one line of a message."""
    text = printable(str(value))
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(text: str) -> str:
    """Replace the control characters of `text`, which could command a terminal, by escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def parse_json(
    cls: type[_Record],
    data: bytes | str,
    where: str,
    *,
    error: type[UserError] = UserError,
    ignore_unknown: bool = False,
) -> _Record:
    """Parse JSON into the record, or other type, `cls`. Raises `error` naming `where` and the key.

    Keys must be those of the record, unless `ignore_unknown` admits further ones, and values of the
    annotated types; no value is converted, but lists become tuples.
    """
    from pydantic import ValidationError

    if len(data) > MAX_BYTES:
        raise error(f"{where}: {len(data)} bytes are more than the allowed {MAX_BYTES}")
    if isinstance(data, bytes):
        data = data.removeprefix(codecs.BOM_UTF8)  # which editors of Windows write
    extra = "ignore" if ignore_unknown else None
    try:
        return cast(_Record, _adapter(cast(Hashable, cls)).validate_json(data, extra=extra))
    except ValidationError as problems:
        raise error(f"{where}: {_describe(problems)}") from None


def replace_lone_surrogates(data: bytes) -> bytes:
    r"""Replace escapes of JSON that are no character by \ufffd, which stands for such ones.

    Programs write the half of an emoji where they cut texts by UTF-16 units.
    """
    return _ESCAPES.sub(lambda found: rb"\ufffd" if found["lone"] else found[0], data)


def parse_value(
    cls: type[_Record],
    value: object,
    where: str,
    *,
    error: type[UserError] = UserError,
    ignore_unknown: bool = False,
) -> _Record:
    """Check plain values, such as parsed YAML, as `parse_json` checks JSON."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"{where}: {shorten(problem, 200)}") from None
    return parse_json(cls, text, where, error=error, ignore_unknown=ignore_unknown)


@lru_cache(maxsize=256)
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter  # takes 0.1 s

    return TypeAdapter(cls)


def _describe(problems: Any) -> str:
    """First problem of a pydantic ValidationError, as `KEY: what is wrong`."""
    first = problems.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    return shorten(f"{key}: {words}" if key else words, 300)


def decode_text(data: bytes, where: str) -> str:
    """Decode UTF-8 with or without a byte order mark. Raises UserError naming `where`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start:,} ({error.reason}); convert the text"
        ) from None


def decode_lines(data: bytes, where: str) -> list[str]:
    r"""Decode the lines of a text, which end in \n, \r\n or \r.

    `str.splitlines` would also divide lines at form feeds, U+0085 and U+2028.
    """
    return decode_text(data, where).replace("\r\n", "\n").replace("\r", "\n").split("\n")


class _PlainLoader(yaml.SafeLoader):
    """Refuses merge keys, which a few hundred bytes can multiply to billions of entries."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Raise YAMLError for a mapping with a merge key."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not supported")


def parse_yaml(data: bytes | str, where: str) -> Any:
    """Parse one YAML document of plain values. Raises UserError naming `where`.

    Tags that name Python objects and merge keys are refused, and so are documents that aliases
    blow up.
    """
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{where}: more than the allowed {MAX_YAML_BYTES} bytes of YAML")
    try:
        value = yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise UserError(f"{where}: not YAML ({shorten(problem, 200)})") from None
    _count_nodes(value, where)
    return value


def _count_nodes(value: Any, where: str) -> None:
    """Raise UserError when a document has a loop or a huge number of values."""
    stack, count = [value], 0
    while stack:
        count += 1
        if count > _MAX_NODES:
            raise UserError(f"{where}: more than {_MAX_NODES} values, or a loop of aliases")
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def seal_of(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON object without its seal; the order of keys does not matter."""
    unsealed = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def dump_sealed(content: Any) -> bytes:
    """Encode a record or JSON object with its seal, as indented JSON with a final newline."""
    plain = _plain(content)
    return (json.dumps({**plain, SEAL: seal_of(plain)}, indent=2) + "\n").encode()


def parse_sealed(
    cls: type[_Record], data: bytes | str, where: str, *, error: type[UserError] = UserError
) -> _Record:
    """Parse what `dump_sealed` wrote. Raises `error` when its content does not fit its seal."""
    content = parse_json(dict[str, Any], data, where, error=error)
    if content.pop(SEAL, None) != seal_of(content):
        raise error(f"{where}: damaged, its content does not match its {SEAL}; restore the file")
    text = json.dumps(content)
    del content  # 80 MB in a manifest of 100,000 shards
    return parse_json(cls, text, where, error=error)


def dump_rows(rows: Iterable[Any]) -> bytes:
    """Encode records or JSON objects as JSON lines, each with its seal."""
    plain = map(_plain, rows)
    return "".join(json.dumps({**row, SEAL: seal_of(row)}) + "\n" for row in plain).encode()


def parse_rows(
    cls: type[_Record], data: bytes, where: str, *, error: type[UserError] = UserError
) -> list[_Record]:
    """Parse the complete lines that `dump_rows` wrote; a last line without its end is ignored.

    Raises `error` naming the line.
    """
    complete, _, _ = data.rpartition(b"\n")
    return [
        parse_sealed(cls, line, f"{where}, line {number}", error=error)
        for number, line in enumerate(complete.split(b"\n"), start=1)
        if line.strip()
    ]


def dump_csv(records: Sequence[Mapping[str, object]]) -> bytes:
    """Encode one or more records with the same keys, in one order, as CSV; None is an empty field.

    Text that a spreadsheet would run as a formula is preceded by an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows(map(_without_formula, one.values()) for one in records)
    return buffer.getvalue().encode()


def _without_formula(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.replace("\r", "\n")  # csv does not quote \r, and spreadsheets start a line there
    try:
        float(text)  # a number such as -0.5 is no formula
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text
    return text


def _plain(content: Any) -> dict[str, Any]:
    """A record or mapping as the JSON object that parsing gives back."""
    plain = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content  # type: ignore[arg-type]
    return dict(json.loads(json.dumps(plain)))


def path_inside(folder: Path, name: str) -> Path:
    """Path of `name`, which a file states, in a local folder.

    Raises UserError unless `name` is a relative path that leads, also through symbolic links, to a
    place inside the folder.
    """
    path = folder / PurePosixPath(name)
    if not is_relative_path(name) or leads_out(folder, path):
        raise UserError(f"{folder}: the name {shorten(name)!r} does not lead inside this folder")
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path` leads, also through symbolic links, to a place outside of `folder`."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
