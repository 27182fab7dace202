"""Captions of scenes: five for each scene, and the parser from a caption back to its scene.

The image sets call `write_captions`; evaluation calls `parse_caption` to learn what an image should
show.
"""

import re
from dataclasses import replace

from ifvit.errors import UserError
from ifvit.records import shorten
from ifvit.scenes.drawings import COLOURS, KINDS, Group, Relation, Scene

NUM_CAPTIONS = 5
NUMBER_WORDS = ("one", "two", "three", "four", "five")

# {first} and {second} become "two red circles", {first_in} and {second_in} "two circles in red";
# {a_first} and {a_second} say "a" where the others say "one".
_SINGLE = (
    "{first}",
    "a picture of {a_first}",
    "{a_first_in}",
    "{first} and nothing else",
    "a drawing with {first_in}",
)
_PAIR = (
    "{first} {relation} {second}",
    "{a_second} {inverse} {a_first}",
    "a picture of {a_first} {relation} {a_second}",
    "a drawing with {second_in} {inverse} {first_in}",
    "{a_first_in} {relation} {a_second_in}",
)
_INVERSE: dict[Relation, str] = {"left of": "right of", "above": "below"}

_COUNT = f"(?P<count>a|{'|'.join(NUMBER_WORDS)})"
_COLOUR = f"(?P<colour>{'|'.join(COLOURS)})"
_KIND = f"(?P<kind>{'|'.join(KINDS)})s?"
_GROUPS = (
    re.compile(rf"\b{_COUNT} {_COLOUR} {_KIND}\b"),
    re.compile(rf"\b{_COUNT} {_KIND} in {_COLOUR}\b"),
)


def write_captions(scene: Scene) -> tuple[str, ...]:
    """Write five different captions; each states all counts, colours, kinds and the relation."""
    phrases = _phrases("first", scene.first)
    if scene.second is None or scene.relation is None:
        return tuple(template.format(**phrases) for template in _SINGLE)
    phrases |= _phrases("second", scene.second)
    words = {"relation": scene.relation, "inverse": _INVERSE[scene.relation]}
    return tuple(template.format(**phrases, **words) for template in _PAIR)


def parse_caption(text: str) -> Scene:
    """Return the scene that `write_captions` would describe like this; "a" and "one" are equal.

    Raises UserError when `text` follows none of the templates.
    """
    matches = [match for pattern in _GROUPS for match in pattern.finditer(text)]
    groups = [
        Group(
            count=1 if match["count"] == "a" else NUMBER_WORDS.index(match["count"]) + 1,
            colour=match["colour"],
            kind=match["kind"],
        )
        for match in sorted(matches, key=re.Match.start)
    ]
    wanted = _spell_out(text)
    for scene in _candidates(groups):
        if wanted in map(_spell_out, write_captions(scene)):
            return scene
    raise UserError(
        f'caption "{shorten(text)}" follows no template of the scenes; '
        'write for example "two red circles left of a blue square"'
    )


def _candidates(groups: list[Group]) -> list[Scene]:
    """All scenes of exactly these groups; a caption may name the second group first."""
    if len(groups) == 1:
        return [Scene(first=groups[0])]
    if len(groups) != 2:
        return []
    forward = Scene(first=groups[0], second=groups[1])
    backward = Scene(first=groups[1], second=groups[0])
    return [replace(scene, relation=name) for name in _INVERSE for scene in (forward, backward)]


def _spell_out(text: str) -> str:
    """Replace "a red circle" by "one red circle"."""
    for pattern in _GROUPS:
        text = pattern.sub(lambda match: re.sub("^a ", "one ", match[0]), text)
    return text


def _phrases(name: str, group: Group) -> dict[str, str]:
    number = NUMBER_WORDS[group.count - 1]
    article = "a" if group.count == 1 else number
    kind = group.kind if group.count == 1 else f"{group.kind}s"
    return {
        name: f"{number} {group.colour} {kind}",
        f"a_{name}": f"{article} {group.colour} {kind}",
        f"{name}_in": f"{number} {kind} in {group.colour}",
        f"a_{name}_in": f"{article} {kind} in {group.colour}",
    }
