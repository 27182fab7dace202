"""Token ids of 200 awkward captions by CLIP's vocabulary, compared with those of open_clip.

clip_tokens.json was made with open_clip_torch 3.3.0 and ftfy 6.3.1. It holds the captions, the ids
that open_clip's tokenizer gives, and those merges of CLIP's vocabulary (OpenAI, MIT licence) that
can occur in these captions, with their ids. Where the ids differ from ours, `cleaned` is the
caption after open_clip's cleaning: mojibake mended by ftfy, HTML entities replaced, lower case.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ifvit.models.clip import load_tokenizer, tokenize

LENGTH = 77
START, END = 49406, 49407
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>")
STORED: dict[str, Any] = json.loads(Path(__file__).with_name("clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    ids = {token: number for number, token in enumerate(tokens)}
    ids |= {merge.replace(" ", ""): number for merge, number in STORED["merges"].items()}
    ids |= {"<|startoftext|>": START, "<|endoftext|>": END}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *STORED["merges"], ""]))
    return load_tokenizer(folder)


def token_ids(tokenizer: Any, caption: str) -> list[int]:
    """Ids with start and end token, without padding."""
    ids: list[int] = tokenize(tokenizer, [caption], LENGTH).input_ids[0].tolist()
    return ids[: ids.index(END, 1) + 1]


def test_ids_are_those_of_open_clip_unless_it_cleans_the_caption(tokenizer: Any) -> None:
    rows = STORED["captions"]
    assert len({row["caption"] for row in rows}) == 200
    for row in rows:
        found = token_ids(tokenizer, row["caption"])
        if any(name in row["caption"] for name in SPECIAL):
            assert found != row["ids"]  # each tokenizer knows its own names of special tokens
        elif "cleaned" in row:
            assert found != row["ids"]
            assert token_ids(tokenizer, row["cleaned"]) == row["ids"]
        else:
            assert found == row["ids"], row
    assert sum("cleaned" in row for row in rows) == 43
