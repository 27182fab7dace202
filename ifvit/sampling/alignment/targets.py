"""Which text tokens attention regulation strengthens.

Without a tagger of parts of speech: the words of a caption that a short list of function words,
colours, sizes and places does not name, and that do not end like a participle. That leaves the
nouns and numerals, now and then with a rare adjective or a finite verb; who knows better says so.

Shapes: B captions, M text tokens, T targets of the caption that has most.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ifvit.errors import UserError

Span = tuple[int, int]
"""First character and last character + 1."""

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_PARTICIPLE = re.compile(r".{3,}(?:ing|ed)$")
_NOUNS_LIKE_PARTICIPLES = frozenset(
    ("building", "ceiling", "clothing", "evening", "morning", "railing")
)
_OTHER_WORDS = frozenset(
    _WORD.findall(
        """
    a an the this that these those its his her their our my your it he she they we you i who which
    and or but nor so as if than then while when where there here not no nothing else only just also
    of in on at by to for from with without into onto upon over under above below beneath beside
    besides between behind near next along across around through against about off out up down
    inside outside within during before after toward towards
    left right top bottom front back side middle center centre
    is are was were be been being am do does did has have had can could will would may might must
    some any many few several each every all both other another very more most much too quite
    red orange yellow green blue purple violet pink brown black white gray grey dark light bright
    big small large little tiny huge tall short long old new young high low wide open full empty
    picture photo photograph image drawing painting
    """
    )
)


@dataclass(frozen=True, kw_only=True)
class TargetTokens:
    """Where the targets of each caption stand among its text tokens."""

    positions: Tensor
    """(B, T) int64 in 0 ... M - 1; 0 where nothing is present."""
    present: Tensor
    """(B, T) bool."""

    def to(self, device: torch.device) -> "TargetTokens":
        """The same on another device."""
        return TargetTokens(positions=self.positions.to(device), present=self.present.to(device))


def find_targets(
    captions: Sequence[str],
    phrase: str | None,
    token_spans: Callable[[str], Sequence[Span]],
) -> TargetTokens:
    """The tokens of the words of `phrase` or, without one, of each caption's nouns and numerals.

    `token_spans` says which characters each token stands for. A caption without any target is
    not regulated. Raises UserError for a word of the phrase that a caption does not hold.
    """
    rows = []
    for caption in captions:
        spans = _nouns_and_numerals(caption) if phrase is None else _spans_of(phrase, caption)
        rows.append([i for i, token in enumerate(token_spans(caption)) if _is_in(token, spans)])
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in rows])
    return TargetTokens(positions=padded, present=torch.arange(longest) < counts[:, None])


def _nouns_and_numerals(caption: str) -> list[Span]:
    return [match.span() for match in _WORD.finditer(caption) if _may_be_noun(match[0].lower())]


def _may_be_noun(word: str) -> bool:
    if word in _NOUNS_LIKE_PARTICIPLES:
        return True
    return word not in _OTHER_WORDS and not _PARTICIPLE.match(word)


def _spans_of(phrase: str, caption: str) -> list[Span]:
    """The k-th mention of a word in the phrase is its k-th occurrence in the caption."""
    wanted = Counter(match[0].lower() for match in _WORD.finditer(phrase))
    spans = []
    for match in _WORD.finditer(caption):
        if wanted[match[0].lower()] > 0:
            wanted[match[0].lower()] -= 1
            spans.append(match.span())
    if missing := [word for word, count in wanted.items() if count > 0]:
        raise UserError(
            f'regulation.targets: "{missing[0]}" is not in the prompt "{caption}"; name its words'
        )
    return spans


def _is_in(token: Span, words: list[Span]) -> bool:
    """Whether the token is a piece of one of the words; special tokens have no characters."""
    start, end = token
    return start < end and any(first <= start and end <= last for first, last in words)
