"""Fields of recipes that are one of several dataclasses: which one do the words mean?

jsonargparse tries a union's members one after the other, and tells of a mistake what each of them
has against it. Here the key `architecture` decides beforehand, so that a mistake is one line.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import yaml

from ifvit.errors import UserError

KEY = "architecture"


def choose_variants(cls: type[Any], words: Sequence[str]) -> tuple[dict[str, type[Any]], list[str]]:
    """The member of each union of dataclasses in `cls`, and the words without what it replaced.

    A recipe or flag that names another architecture than before takes the place of all that was
    said of the field before. Raises UserError for an architecture that does not exist.
    """
    chosen: dict[str, type[Any]] = {}
    remaining = [word for flag in words for word in _split(flag)]
    for name, hint in get_type_hints(cls).items():
        members = get_args(hint) if isinstance(hint, UnionType) else ()
        if members and all(map(is_dataclass, members)):
            chosen[name], remaining = _choose(name, members, remaining)
    return chosen, remaining


def _choose(
    name: str, members: Sequence[type[Any]], words: list[str]
) -> tuple[type[Any], list[str]]:
    by_name = {_architecture(member): member for member in members}
    current = _architecture(members[0])
    kept: list[str] = []
    for word, value in _with_next(words):
        named = _named(name, word, value)
        if named is not None and named != current:
            if named not in by_name:
                raise UserError(f"{name}.{KEY}: {named} is none of {', '.join(by_name)}")
            kept, current = _forget(name, kept), named
        kept.append(word)
    return by_name[current], kept


def _with_next(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words, [*words[1:], ""], strict=False))


def _architecture(member: type[Any]) -> str:
    (field,) = (field for field in fields(member) if field.name == KEY)
    return str(field.default)


def _split(word: str) -> list[str]:
    """`--flag=value` as two words, so that each stands where the other form has it."""
    flag, equals, value = word.partition("=")
    return [flag, value] if equals and flag.startswith("--") else [word]


def _named(name: str, flag: str, value: str) -> str | None:
    """The architecture that a flag's value names for the field, if it does."""
    if flag == f"--{name}.{KEY}":
        return value
    if flag not in ("--config", f"--{name}"):
        return None
    said = _load(value)
    if flag == "--config" and isinstance(said, dict):
        said = said.get(name)
        if isinstance(said, str):
            said = _load(str(Path(value).parent / said))
    return said.get(KEY) if isinstance(said, dict) else None


def _forget(name: str, words: list[str]) -> list[str]:
    """The words without any that speak of the field."""
    kept: list[str] = []
    skip = False
    for word, value in _with_next(words):
        if skip:
            skip = False
        elif word == f"--{name}" or word.startswith(f"--{name}."):
            skip = True
        elif word == "--config" and isinstance(recipe := _load(value), dict) and name in recipe:
            skip = True
            del recipe[name]
            kept += ["--config", json.dumps(recipe)]
        else:
            kept.append(word)
    return kept


def _load(text: str) -> Any:
    """The YAML in a file, or in the text itself; what is broken is for jsonargparse to refuse."""
    try:
        is_file = Path(text).is_file()
        return yaml.safe_load(Path(text).read_text() if is_file else text)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return None
