"""Recipes: frozen dataclasses filled from defaults, then YAML files, then flags."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from ifvit.errors import UserError

KEY = "architecture"


def choose_variants(cls: type[Any], words: Sequence[str]) -> tuple[dict[str, type[Any]], list[str]]:
    """The member of each union of dataclasses in `cls`, and the words without what it replaced.

    A recipe or flag that names another architecture than before takes the place of all that was
    said of the field before. Raises UserError for an architecture that does not exist.
    """
    chosen: dict[str, type[Any]] = {}
    remaining = list(words)
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
                raise UserError(f"{name}.{KEY}: expected one of {', '.join(by_name)}, not {named}")
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


Config = TypeVar("Config")

_CONFIGS = Path(__file__).parent / "configs"
"""A link to the repository's recipes, whose place their copies take in an installed package."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_config(
    cls: type[Config], argv: Sequence[str], *, prog: str, positional: str | None = None
) -> Config:
    """Parse `--config` files and flags into the dataclass `cls`; a later value wins.

    Words before the first flag go to the field `positional`, one to a string, many to a list; it
    may name several strings, separated by spaces.
    `--help` and `--print_config` print and leave with code 0. Raises UserError, in one line, for
    an unknown key, a wrong type, a missing value or one that `cls` refuses.
    """
    parser = ArgumentParser(
        prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML recipe; repeat it, later ones win; --recipe NAME is one that ships with ifvit",
    )
    words = _spell_switches(cls, _name_each(cls, _name_positional(cls, argv, positional)))
    try:
        words = _find_recipe(prog, words)
        _check_syntax(words)
        words = _find_shipped(cls, [part for word in words for part in _split(word)])
        chosen, words = choose_variants(cls, words)
        fields = parser.add_class_arguments(cls, skip=set(chosen))
        for name, variant in chosen.items():
            parser.add_argument(f"--{name}", type=variant, required=True)
        values = parser.instantiate(parser.parse_args(words))
        return cls(**{name: values[name] for name in (*fields, *chosen)})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{prog}: {_one_line(error)}") from None


def dump_config(config: Any) -> str:
    """The YAML text that `read_config` turns back into an equal `config`."""
    # Through JSON, because YAML would mark tuples as Python objects.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _name_positional(cls: type[Any], argv: Sequence[str], names: str | None) -> list[str]:
    """`["a", "b", "--x"]` => `["--name+", "a", "--name+", "b", "--x"]` for one field of many words.

    Fields of one word, `"first second"`, take one each: `["--first", "a", "--second", "b", "--x"]`.
    """
    if names is None:
        return list(argv)
    free = list(takewhile(lambda word: not word.startswith("-"), argv))
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if fields[names.split()[0]] is str:
        named = [(f"--{name}", word) for name, word in zip(names.split(), free, strict=False)]
    else:
        named = [(f"--{names}+", word) for word in free]
    return [*(word for pair in named for word in pair), *argv[len(named) :]]


def _find_shipped(cls: type[Any], words: Sequence[str]) -> list[str]:
    """`--protocol scenes` => `--protocol PATH` of configs/protocol/scenes.yaml, as installed.

    Does so for every nested recipe that has a folder of its name in configs/. A file of that name
    takes precedence.
    """
    nested = (f for f in fields(cls) if any(map(is_dataclass, (f.type, *get_args(f.type)))))
    flags = {f"--{field.name}" for field in nested}
    found = list(words)
    for place, (flag, name) in enumerate(pairwise(words), start=1):
        folder = _CONFIGS / flag.removeprefix("--")
        if flag in flags and folder.is_dir() and re.fullmatch(r"[\w-]+", name):
            found[place] = name if Path(name).exists() else _shipped(flag, folder, name)
    return found


def _check_syntax(words: Sequence[str]) -> None:
    """Raise UserError for a recipe that is not YAML; jsonargparse would not name its file."""
    for flag, file in pairwise(words):
        if flag == "--config" and Path(file).is_file():
            try:
                yaml.safe_load(Path(file).read_text())
            except yaml.YAMLError as error:
                raise UserError(f"{file}: not YAML ({_one_line(error)})") from None


def _find_recipe(prog: str, words: Sequence[str]) -> list[str]:
    """`--recipe paper` of `ifvit submit pipeline` => `--config configs/pipeline/paper.yaml`."""
    found = list(words)
    for place, (flag, name) in enumerate(pairwise(words)):
        if flag == "--recipe":
            path = _shipped(flag, _CONFIGS / prog.split()[-1], name)
            found[place : place + 2] = ["--config", path]
    return found


def _shipped(flag: str, folder: Path, name: str) -> str:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{flag} {name}: no such file; by name there are {known or 'none'}")
    return str(path)


def _name_each(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """`--class a b` => `--classes+ a --classes+ b` for a field `classes` of "each" `class`."""
    fields = {
        f"--{field.metadata['each']}": f"--{field.name}+"
        for field in dataclasses.fields(cls)
        if "each" in field.metadata
    }
    named: list[str] = []
    flag = None
    for word in argv:
        if word.startswith("-"):
            flag = fields.get(word)
            named += [] if flag else [word]
        else:
            named += [flag, word] if flag else [word]
    return named


def _spell_switches(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """`--json` => `--json=true` for the boolean fields of `cls`; jsonargparse wants a value."""
    switches = {f"--{field.name}" for field in dataclasses.fields(cls) if field.type is bool}
    followers = [*argv[1:], "--"]
    return [
        f"{word}=true" if word in switches and follower.startswith("-") else word
        for word, follower in zip(argv, followers, strict=False)
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
