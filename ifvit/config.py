"""Recipes: frozen dataclasses that are filled from defaults, then YAML files, then flags.

`cli.main` calls `read_config`. jsonargparse does the typing, the merging and the help. This module
adds what jsonargparse 4.53 does not offer: words without a flag that fill a list, switches without
a value, shipped recipes by name, and unions of dataclasses. (jsonargparse tries all members of a
union in turn: one wrong key gives twelve lines, and a flag cannot change one field of a member.)
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from ifvit.errors import UserError

Config = TypeVar("Config")
Flag = tuple[str, str | None]
"""`--name` and its value; None for a flag without a value, such as --help."""

KEY = "architecture"
"""Field that tells the members of a union of dataclasses apart."""
_CONFIGS = Path(__file__).parent / "configs"
"""Shipped recipes: a link in the repository, a folder in an installed package."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_config(
    cls: type[Config], argv: Sequence[str], *, prog: str, positional: str | None = None
) -> Config:
    """Parse `--config` files and flags into the dataclass `cls`; a later value wins.

    `positional` names the fields that take the words before the first flag: one list field, or
    several string fields (names separated by spaces). `--help` and `--print_config` print and exit
    with code 0. Raises UserError, in one line, for an unknown key, a wrong type, a missing value,
    and for a value that `cls` rejects.
    """
    parser = ArgumentParser(
        prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML recipe; with several, later ones win; --recipe NAME is a shipped recipe",
    )
    try:
        flags = _find_shipped(cls, prog, _split_flags(cls, argv, positional))
        for flag, value in flags:
            if flag == "--config" and value:
                _load(value)  # because jsonargparse does not name a file that is not YAML
        chosen: dict[str, type[Any]] = {}
        for name, hint in get_type_hints(cls).items():
            members = get_args(hint) if isinstance(hint, UnionType) else ()
            if members and all(map(is_dataclass, members)):
                chosen[name], flags = _choose_member(name, members, flags)
        names = parser.add_class_arguments(cls, skip=set(chosen))
        for name, member in chosen.items():
            parser.add_argument(f"--{name}", type=member, required=True)
        words = [word for flag in flags for word in flag if word is not None]
        values = parser.instantiate(parser.parse_args(words))
        return cls(**{name: values[name] for name in (*names, *chosen)})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{prog}: {_one_line(error)}") from None


def dump_config(config: Any) -> str:
    """Write `config` as the YAML text that `read_config` reads back as an equal object."""
    # Through JSON, because YAML would mark tuples as Python objects.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _split_flags(cls: type[Any], argv: Sequence[str], positional: str | None) -> list[Flag]:
    """Pair each flag with its value; name the flag of each word that has none.

    `--json` of a boolean field becomes `--json true`. `--class a b`, for a field `classes` with
    "each": "class" in its metadata, becomes `--classes+ a --classes+ b`.
    """
    kinds = {field.name: field.type for field in fields(cls)}
    each = {f"--{f.metadata['each']}": f"--{f.name}+" for f in fields(cls) if "each" in f.metadata}
    open_positionals = positional.split() if positional else []
    flags: list[Flag] = []
    list_flag = None
    if open_positionals and kinds[open_positionals[0]] is not str:
        list_flag = f"--{open_positionals[0]}+"
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.partition("=")
            list_flag = each.get(name)
            if equals:
                flags.append((list_flag or name, value))
            elif not list_flag:
                flags.append((name, None))
            open_positionals = []
        elif list_flag:
            flags.append((list_flag, word))
        elif open_positionals:
            flags.append((f"--{open_positionals.pop(0)}", word))
        elif flags and flags[-1][1] is None:
            flags[-1] = (flags[-1][0], word)
        else:
            flags.append((word, None))  # jsonargparse reports the superfluous word
    return [
        (name, "true") if value is None and kinds.get(name[2:]) is bool else (name, value)
        for name, value in flags
    ]


def _find_shipped(cls: type[Any], prog: str, flags: list[Flag]) -> list[Flag]:
    """Replace names of shipped recipes by their files in configs/.

    `--recipe NAME` of `ifvit VERB` becomes `--config configs/VERB/NAME.yaml`. `--protocol NAME`,
    for a field with a folder of its name, becomes `--protocol configs/protocol/NAME.yaml`; a local
    file called NAME takes precedence.
    """
    nested = {
        f"--{field.name}"
        for field in fields(cls)
        if any(map(is_dataclass, (field.type, *get_args(field.type))))
    }
    found: list[Flag] = []
    for flag, value in flags:
        folder = _CONFIGS / flag.removeprefix("--")
        if flag == "--recipe" and value:
            found.append(("--config", _shipped(flag, _CONFIGS / prog.split()[-1], value)))
        elif flag in nested and folder.is_dir() and value and re.fullmatch(r"[\w-]+", value):
            found.append((flag, value if Path(value).exists() else _shipped(flag, folder, value)))
        else:
            found.append((flag, value))
    return found


def _shipped(flag: str, folder: Path, name: str) -> str:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{flag} {name}: no such file; shipped names are {known or 'none'}")
    return str(path)


def _choose_member(
    name: str, members: Sequence[type[Any]], flags: list[Flag]
) -> tuple[type[Any], list[Flag]]:
    """Choose the union member of field `name` by its architecture; the first is the default.

    When a recipe or flag names a new architecture, all earlier settings of this field are dropped.
    Raises UserError for an unknown architecture.
    """
    by_name = {str(getattr(member, KEY)): member for member in members}
    current = next(iter(by_name))
    kept: list[Flag] = []
    for flag, value in flags:
        named = _architecture(name, flag, value) or current
        if named not in by_name:
            raise UserError(f"{name}.{KEY}: expected one of {', '.join(by_name)}, not {named}")
        if named != current:
            kept, current = _without(name, kept), named
        kept.append((flag, value))
    return by_name[current], kept


def _architecture(name: str, flag: str, value: str | None) -> str | None:
    """Architecture that one flag gives to field `name`; None when it gives none."""
    if value is None or flag not in ("--config", f"--{name}", f"--{name}.{KEY}"):
        return None
    if flag == f"--{name}.{KEY}":
        return value
    content = _load(value)
    if flag == "--config" and isinstance(content, dict):
        content = content.get(name)
        if isinstance(content, str):
            content = _load(str(Path(value).parent / content))
    return content.get(KEY) if isinstance(content, dict) else None


def _without(name: str, flags: list[Flag]) -> list[Flag]:
    """Remove everything that recipes and flags say about field `name`."""
    kept: list[Flag] = []
    for flag, value in flags:
        recipe = _load(value) if flag == "--config" and value else None
        if isinstance(recipe, dict) and name in recipe:
            del recipe[name]
            kept.append((flag, json.dumps(recipe)))
        elif flag != f"--{name}" and not flag.startswith(f"--{name}."):
            kept.append((flag, value))
    return kept


def _load(value: str) -> Any:
    """Parse a YAML file, or YAML text. Raises UserError that names a file that is not YAML."""
    try:
        is_file = Path(value).is_file()
        return yaml.safe_load(Path(value).read_text() if is_file else value)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if is_file:
            raise UserError(f"{value}: not YAML ({_one_line(error)})") from None
    except OSError:
        pass
    return None  # jsonargparse rejects a value that is neither a file nor YAML


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
