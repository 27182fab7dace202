"""Damages files at random, and counts what the readers make of them."""

import gzip
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from guard import CANARY, Guard, contents, digest

from ifvit.records import SEAL, seal_of

_VALUES = (
    *("NaN", "-1", "0", "1", "0.5", "1e308", "-1e308", "1e999", "1" + "0" * 400, str(2**63)),
    *('""', "null", "[]", "{}", "true", "false", "[[]]", '{"a": 1}', "[" * 5000 + "]" * 5000),
    *('"../x"', '"OUTSIDE/secret"', '"../outside/secret"', '"os:popen"', '"http://127.0.0.1:9/x"'),
    *(f'"\\u001b]0;{CANARY}\\u0007"', '"\\ud800"', '"a\\u0000b"', '"a\\nb"', '"NaN"', '"-1"'),
    *('"{{7*7}}${7*7}"', '"' + "x" * 300_000 + '"', '"' + "f" * 64 + '"', '"__class__"', "9" * 20),
)
"""JSON texts in place of a value; OUTSIDE becomes the folder beside that of the readers."""
_PLACE = "value-to-be-replaced"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file of an instance, and how the program reads it."""

    name: str
    folder: Path
    """An intact instance, which is copied."""
    file: str
    """Path of the damaged file in the folder."""
    readers: tuple[Callable[[Path], object], ...]
    sealed: bool
    """A different result is wrong; otherwise the file is the user's, and a change is legal."""
    hashed_in: tuple[str, ...] = ()
    """Files with the hash of the damaged one, each followed by the one with its own hash."""


Maker = Callable[[Path], list[Format]]
"""Makes instances in a folder."""


@dataclass
class Tally:
    """Number of mutations by verdict, and what is wrong about the bad ones."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(
            f"{self.counts[key]} {key}" for key in ("equal", "refused", "other", "BAD")
        )


def fuzz(format: Format, sandbox: Path, num_mutations: int, seed: int = 0) -> Tally:
    """Read the intact file, then `num_mutations` damaged ones, in a copy below `sandbox`."""
    tally, guard = Tally(), Guard(sandbox)
    intact = contents(format.folder)
    expected = []
    for reader in format.readers:
        guard.restore(intact)
        expected.append(digest(guard.call(reader)))
    for number in range(num_mutations):
        draw = random.Random(f"{seed} {format.name} {number}")
        pairs = list(zip(format.readers, expected, strict=True))
        if number >= len(_REPLACEMENTS):
            pairs = [pairs[number % len(pairs)]]
        for reader, wanted in pairs:
            guard.restore(intact)
            kind = damage(guard.box, format.file, number, random.Random(draw.random()))
            # Every second mutation is an attack: seals and hashes fit the changed content.
            is_resealed = number % 2 == 1 and reseal(guard.box, format, intact)
            path = guard.box / format.file
            sealed = format.sealed and not is_resealed and not is_cut(path, intact[format.file])
            verdict, problem = guard.judge(reader, wanted, sealed, kind == "link_to_other")
            tally.counts[verdict] += 1
            if problem:
                resealed = ", resealed" if is_resealed else ""
                tally.problems.append(
                    f"{format.name} #{number} ({kind}{resealed}): {reader.__name__}: {problem}"
                )
    guard.restore(intact)
    return tally


def damage(box: Path, file: str, number: int, draw: random.Random) -> str:
    """Damage a file => in words how. The first mutations replace the file, the others change it."""
    path = box / file
    data = path.read_bytes()
    if number < len(_REPLACEMENTS):
        replace = _REPLACEMENTS[number]
        replace(path, data, box.parent / "outside")
        return replace.__name__
    document = _parse(path, data)
    if document is not None and draw.random() < 0.7:
        text = _change_value(path, document, draw)
        path.write_bytes(text.replace("OUTSIDE", str(box.parent / "outside")).encode())
        return "value"
    change = draw.choice(_CHANGES)
    path.write_bytes(change(data, draw))
    return change.__name__


def reseal(box: Path, format: Format, intact: dict[str, bytes]) -> bool:
    """Make the seal of the damaged file and the hashes of it fit => whether anything did change."""
    path = box / format.file
    if not path.is_file() or path.is_symlink():
        return False
    changed = seal_again(path)
    name = format.file
    for holder in format.hashed_in:
        before, after = intact[name], (box / name).read_bytes()
        text = (box / holder).read_text()
        text = text.replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(after).hexdigest())
        (box / holder).write_text(text.replace(f'bytes": {len(before)}', f'bytes": {len(after)}'))
        changed = True
        seal_again(box / holder)
        name = holder
    return changed


def is_cut(path: Path, intact: bytes) -> bool:
    """Whether a file is missing, or only whole rows of it are missing or repeated."""
    if not path.is_file():
        return not path.exists()
    if path.suffix != ".jsonl":
        return False
    lines = path.read_bytes().splitlines(keepends=True)
    return {line for line in lines if line.endswith(b"\n")} <= set(intact.splitlines(keepends=True))


def seal_again(path: Path) -> bool:
    """Recompute the seal of a JSON object, or of each JSON line."""
    try:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        rows = [json.loads(line) for line in lines]
        found = [SEAL in row for row in rows]
        rows = [{**row, SEAL: seal_of(row)} for row in rows]
    except (ValueError, TypeError, RecursionError):
        return False
    if any(found):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return any(found)


def remove(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()


def empty(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def link_to_copy(path: Path, data: bytes, outside: Path) -> None:
    (outside / "copy").write_bytes(data)
    path.unlink()
    path.symlink_to(outside / "copy")


def link_to_other(path: Path, data: bytes, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "secret")


def utf16(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(data.decode("latin-1").encode("utf-16"))


def compressed(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(gzip.compress(data))


def deep_list(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"]" * 100_000)


def deep_mapping(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n")


def huge_number(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"1" * 10_000)


def null(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"null\n")


def number_only(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"7\n")


def empty_list(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"[]\n")


def empty_mapping(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(b"{}\n")


def python_tag(path: Path, data: bytes, outside: Path) -> None:
    path.write_bytes(f"!!python/object/apply:os.system ['touch {outside}/pwned']\n".encode())


def alias_bomb(path: Path, data: bytes, outside: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines) + "\n")


_REPLACEMENTS: tuple[Callable[[Path, bytes, Path], None], ...] = (
    *(remove, empty, directory, pipe, device, link_to_itself, link_to_copy, link_to_other),
    *(utf16, compressed, deep_list, deep_mapping, huge_number, null, number_only, empty_list),
    *(empty_mapping, python_tag, alias_bomb),
)


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def replace_byte(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] = draw.choice((0, 10, 34, 45, 48, 57, 92, 123, 255))
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def extend(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((draw.randbytes(9), b"\0" * 1024, data, b"}\n", b"garbage\n"))


def duplicate(data: bytes, draw: random.Random) -> bytes:
    start, end = _chunk(data, draw)
    return data[:end] + data[start:end] + data[end:]


def delete(data: bytes, draw: random.Random) -> bytes:
    start, end = _chunk(data, draw)
    return data[:start] + data[end:]


def zero(data: bytes, draw: random.Random) -> bytes:
    start, end = _chunk(data, draw)
    return data[:start] + bytes(end - start) + data[end:]


_CHANGES = (flip_bit, flip_bit, replace_byte, truncate, extend, duplicate, delete, zero)


def _chunk(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 4, 16, 100, 1000)))


def _parse(path: Path, data: bytes) -> Any:
    """The content as plain values; JSON lines become a list. None for other formats."""
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in data.splitlines()]
        return yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
    except (ValueError, yaml.YAMLError):
        return None


def _change_value(path: Path, document: Any, draw: random.Random) -> str:
    """Replace, delete, rename or repeat one entry, and encode the document again."""
    places = list(_places(document))
    holder, key = draw.choice(places)
    action = draw.choice(("value", "value", "value", "delete", "rename", "repeat"))
    if action == "value":
        holder[key] = _PLACE
    elif action == "delete":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == "rename":
        holder[draw.choice(("x", "", "__class__", f"{key}_", "\x1b[31m"))] = holder.pop(key)
    else:
        holder[draw.choice(list(holder))] = holder[key]
    rows = document if path.suffix == ".jsonl" else [document]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    value = draw.choice(_VALUES)
    if path.suffix == ".yaml" and value.startswith("[[["):
        value = value[:100] + value[-100:]  # a second of PyYAML's time otherwise
    return text.replace(f'"{_PLACE}"', value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document, as its dict or list and its key or number."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)
