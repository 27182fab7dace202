"""Recipes: frozen dataclasses that are filled from defaults, then YAML files, then flags.

`cli.main` calls `read_config`. This module reads all YAML files and checks their keys; jsonargparse
does the typing, the merging and the help. This module also adds what jsonargparse 4.53 does not
offer: words without a flag that fill a list, switches without a value, shipped recipes by name,
fields that only a flag may set, and unions of dataclasses. (jsonargparse tries all members of a
union in turn: one wrong key gives twelve lines, and a flag cannot change one field of a member.)
"""

import dataclasses
import json
import re
from argparse import Action
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from ifvit.errors import UserError
from ifvit.records import MAX_YAML_BYTES, check_value, field_hints, parse_yaml, shorten

Config = TypeVar("Config")
Flag = tuple[str, Any]
"""`--name` and its value: a word, the content of a YAML file, or None for a flag like --help."""

KEY = "architecture"
"""Field that tells the members of a union of dataclasses apart."""
_NAME = re.compile(r"[\w-]+")
"""Name of a shipped recipe, which is no path."""
FLAG_ONLY = {"flag_only": True}
"""`field(metadata=FLAG_ONLY)` is a field that a flag may set, but no YAML file."""
_CONFIGS = Path(__file__).parent / "configs"
"""Shipped recipes: a link in the repository, a folder in an installed package."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_config(
    cls: type[Config], argv: Sequence[str], *, prog: str, positional: str | None = None
) -> Config:
    """Parse `--config` files and flags into the dataclass `cls`; a later value wins.

    `positional` names the fields that take the words before the first flag: one list field, or
    several string fields (names separated by spaces), or `config` for a recipe's file or name.
    `--config` also takes YAML text of several lines. `--help` and `--print_config` print and exit
    with code 0. Raises UserError, in one line, for an unknown key, a wrong type, a missing value,
    and for a value that `cls` rejects.
    """
    parser = ArgumentParser(
        prog=prog,
        description=cls.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML recipe; with several, later ones win; --recipe NAME is a shipped recipe",
    )
    try:
        flags = _find_shipped(cls, prog, _split_flags(cls, argv, positional))
        flags = [(flag, _read_files(cls, flag, value)) for flag, value in flags]
        chosen: dict[str, type[Any]] = {}
        for name, hint in get_type_hints(cls).items():
            members = get_args(hint) if isinstance(hint, UnionType) else ()
            described = _dataclasses_of(hint) if members else []
            if members and len(described) == len(members):
                chosen[name], flags = _choose_member(name, members, flags)
            elif len(described) == 1 and any(_describes(name, *flag) for flag in flags):
                chosen[name] = described[0]  # errors of a union would not name the field
        names = parser.add_class_arguments(cls, skip=set(chosen))
        for name, member in chosen.items():
            parser.add_argument(f"--{name}", type=member, required=True)
        parsed = parser.parse_args([_word(flag, value) for flag, value in flags])
        _check_rules(cls, parsed, "")
        values = parser.instantiate(parsed)
        return cls(**{name: values[name] for name in (*names, *chosen)})
    except (ArgumentError, TypeError, ValueError, OverflowError, OSError) as error:
        unknown = re.search(r"unrecognized arguments: --(\w+)", str(error))
        nested = _in_sections(unknown[1], _fields_of(cls)) if unknown else []
        remedy = f"; use --{' or --'.join(nested)}" if nested else ""
        raise UserError(f"{prog}: {_explain(error)}{remedy}") from None


class _HelpFormatter(DefaultHelpFormatter):
    """Shows the rule of a field's type in words."""

    def _expand_help(self, action: Action) -> str:
        text = re.sub(
            r"type: Annotated\[(\w+), ([^\]]*)\]", r"type: \1, \2", super()._expand_help(action)
        )
        return _without_annotated(text)


def _without_annotated(text: str) -> str:
    return re.sub(r"(?:typing\.)?Annotated\[(\w+), ([^\]]*)\]", r"\1 \2", text)


def _word(flag: str, value: Any) -> str:
    """One word of the command line for jsonargparse."""
    if value is None:
        return flag
    if not isinstance(value, str):
        value = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return f"{flag}={value}"


def _read_files(cls: type[Any], flag: str, value: Any) -> Any:
    """Replace a word that names a YAML file, for --config or a nested dataclass, by its content."""
    if flag == "--config":
        return None if value is None else _load(cls, value, Path(), is_flag=False)
    hint: Any = cls
    for name in flag.removeprefix("--").removesuffix("+").split("."):
        hint = _fields_of(hint).get(name, (None, None))[1]
    if value in (None, "null") or not (any(_dataclasses_of(hint)) or _item_of(hint)):
        return value
    return _load(hint, value, Path(), is_flag=True)


def _load(hint: Any, value: str, folder: Path, *, is_flag: bool) -> Any:
    """Parse YAML text, or the file of this name in `folder`, and check its keys."""
    if "\n" in value or value[:1] in ("{", "["):
        return _expand(hint, parse_yaml(value, "recipe"), "recipe", folder, is_flag=is_flag)
    path = folder / value
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {problem}; name a YAML file")
    with path.open("rb") as file:
        content = parse_yaml(file.read(MAX_YAML_BYTES + 1), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys and values; it must be a YAML mapping")
    return _expand(hint, content, str(path), path.parent, is_flag=False)


def _expand(hint: Any, value: Any, where: str, folder: Path, *, is_flag: bool) -> Any:
    """Check the keys of a recipe, and replace the names of YAML files in it by their contents."""
    item = _item_of(hint)
    if item and isinstance(value, list):
        return [_expand(item, each, where, folder, is_flag=is_flag) for each in value]
    if item and isinstance(value, dict):
        named = value.items()
        return {key: _expand(item, each, where, folder, is_flag=is_flag) for key, each in named}
    known = _fields_of(hint)
    if known and isinstance(value, str):
        return _load(hint, value, folder, is_flag=is_flag)
    if not known or value is None:
        return value  # jsonargparse checks its type
    if not isinstance(value, dict):
        raise UserError(f"{where}: {shorten(value)} in place of the keys {', '.join(known)}")
    expanded = {}
    for key, given in value.items():
        if key not in known:
            nested = _in_sections(key, known)
            remedy = (
                f"use {' or '.join(nested)}" if nested else "known keys are " + ", ".join(known)
            )
            raise UserError(f"{where}: unknown key {shorten(key)}; {remedy}")
        field, field_hint = known[key]
        if field.metadata.get("flag_only") and not is_flag and given != field.default:
            raise UserError(f"{where}: {key} is set by the flag --{key} only, not by a file")
        expanded[key] = _expand(field_hint, given, where, folder, is_flag=is_flag)
    return expanded


def _in_sections(key: str, known: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """SECTION.KEY for each of these fields that is a section with this key."""
    return [f"{name}.{key}" for name, (_, part) in known.items() if key in _fields_of(part)]


def _fields_of(hint: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Fields of the dataclasses that an annotation admits: name => field and its annotation."""
    return {
        field.name: (field, field_hints(cls)[field.name])
        for cls in _dataclasses_of(hint)
        for field in fields(cls)
        if field.init
    }


def _dataclasses_of(hint: Any) -> list[Any]:
    """The dataclass that `hint` is, or those of a union; none for other annotations."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if is_dataclass(member)]


def _item_of(hint: Any) -> Any:
    """Annotation of the items of a list, tuple or mapping of dataclasses; None for others."""
    origin, args = get_origin(hint), get_args(hint)
    place = {list: 0, tuple: 0, dict: 1}.get(origin)
    return None if place is None or not _dataclasses_of(args[place]) else args[place]


def _check_rules(hint: Any, values: Any, name: str) -> None:
    """Raise UserError, naming the whole flag, for a value that breaks its rule."""
    if isinstance(values, Namespace):
        members = _dataclasses_of(hint)
        named = [cls for cls in members if getattr(cls, KEY, None) == values.get(KEY)]
        for field, inner in field_hints((named or members)[0]).items() if members else ():
            _check_rules(inner, values.get(field), f"{name}.{field}".lstrip("."))
    elif isinstance(values, list) and _item_of(hint):
        for number, item in enumerate(values):
            _check_rules(_item_of(hint), item, f"{name}[{number}]")
    elif isinstance(values, dict) and _item_of(hint):
        for key, item in values.items():
            _check_rules(_item_of(hint), item, f"{name}.{key}")
    else:
        check_value(name, values, hint)


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
    kinds = {"config": str, **{field.name: field.type for field in fields(cls)}}
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
            name = open_positionals.pop(0)
            is_name = name == "config" and _NAME.fullmatch(word) and not Path(word).exists()
            flags.append(("--recipe" if is_name else f"--{name}", word))
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

    `--recipe NAME` of `ifvit VERB` becomes `--config configs/VERB/NAME.yaml`, where VERB is one of
    the words of the verb (`study` of `study run`). `--protocol NAME`,
    for a field with a folder of its name, becomes `--protocol configs/protocol/NAME.yaml`; a local
    file called NAME takes precedence.
    """
    nested = {
        f"--{field.name}"
        for field in fields(cls)
        if any(map(is_dataclass, (field.type, *get_args(field.type))))
    }
    words = prog.split()[::-1]
    verb = next((word for word in words if (_CONFIGS / word).is_dir()), words[0])
    found: list[Flag] = []
    for flag, value in flags:
        folder = _CONFIGS / (verb if flag == "--recipe" else flag.removeprefix("--"))
        is_name = flag in nested and folder.is_dir() and _NAME.fullmatch(value or "")
        if not value or not (flag == "--recipe" or (is_name and not Path(value).exists())):
            found.append((flag, value))
            continue
        path = folder / f"{value}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            remedy = f"shipped names are {known}" if known else "give a file by --config"
            raise UserError(f"{flag} {value}: no such file; {remedy}")
        found.append(("--config" if flag == "--recipe" else flag, str(path)))
    return found


def _describes(name: str, flag: str, value: Any) -> bool:
    """Whether a flag gives the field `name`, which is a dataclass, and not only fields of it."""
    if flag == "--config":
        return isinstance(value, dict) and value.get(name) is not None
    return flag == f"--{name}" and value != "null"


def _choose_member(
    name: str, members: Sequence[type[Any]], flags: list[Flag]
) -> tuple[type[Any], list[Flag]]:
    """Choose the union member of field `name` by its architecture; the first is the default.

    What states an architecture describes the whole field: all earlier settings are dropped.
    Raises UserError for an unknown architecture.
    """
    by_name = {str(getattr(member, KEY)): member for member in members}
    current = next(iter(by_name))
    kept: list[Flag] = []
    for flag, value in flags:
        stated = _architecture(name, flag, value)
        if stated is not None and stated not in by_name:
            raise UserError(
                f"{name}.{KEY}: expected one of {', '.join(by_name)}, not {shorten(stated)}"
            )
        if stated is not None:
            kept, current = _without(name, kept), stated
        kept.append((flag, value))
    return by_name[current], kept


def _architecture(name: str, flag: str, value: Any) -> str | None:
    """Architecture that one flag gives to field `name`; None when it gives none."""
    if flag == f"--{name}.{KEY}":
        return value if isinstance(value, str) else None
    if flag == "--config" and isinstance(value, dict):
        value = value.get(name)
    elif flag != f"--{name}":
        return None
    return value.get(KEY) if isinstance(value, dict) else None


def _without(name: str, flags: list[Flag]) -> list[Flag]:
    """Remove everything that recipes and flags say about field `name`."""
    kept: list[Flag] = []
    for flag, value in flags:
        if flag == "--config" and isinstance(value, dict):
            kept.append((flag, {key: given for key, given in value.items() if key != name}))
        elif flag != f"--{name}" and not flag.startswith(f"--{name}."):
            kept.append((flag, value))
    return kept


_UNION = re.compile(
    r'Parser key "(?P<key>[^"]*)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(?P<types>.*?)\] Errors: .*Given value: (?P<value>.*)"
)
_SINGLE = re.compile(
    r'Parser key "(?P<key>[^"]*)": Expected a (?P<types>.*?)\. Got value: (?P<value>.*)'
)

_NUMBERS = re.compile(r"[-+.,\de]{1,40}")


def _explain(error: Exception) -> str:
    """One short line for an error of jsonargparse: field, value, and what is expected."""
    text = " ".join(str(error).split())
    found = _UNION.search(text) or _SINGLE.search(text)
    if not found:
        return shorten(text, 400)
    name = found["key"]
    if found["value"].startswith(("Namespace(class_path=", "NestedArg(")):
        return f"{name}: give --{name} NAME before its fields, such as --{name} small"
    types = re.sub(r"<class '(\w+)'>", r"\1", _without_annotated(found["types"]))
    types = types.replace("typing.", "").replace("NoneType", "null")
    types = re.sub(r"Literal\[(.*?)\]", r"\1", types)
    types = re.sub(r", (?![^\[]*\])", " or ", types)  # not within tuple[int, int]
    lacks_brackets = re.match(r"(list|tuple)\b", types) and _NUMBERS.fullmatch(found["value"])
    remedy = f", such as '[{found['value']}]'" if lacks_brackets else ""
    return f"{name} is {shorten(found['value'])}; expected {shorten(types, 200)}{remedy}"
