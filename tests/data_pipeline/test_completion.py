"""Completion markers and manifests: any change of any byte is either harmless or a ShardError."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.completion import read_marker
from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.shards import ShardError, read_manifest

NUM_CORRUPTIONS = 250


def corrupt(data: bytes, draw: np.random.Generator) -> bytes:
    """Flip a bit, cut, drop, repeat or overwrite some bytes; never the bytes as they were."""
    place, length = int(draw.integers(len(data))), int(draw.integers(1, 64))
    kind = draw.integers(5)
    if kind == 0:
        changed = bytearray(data)
        changed[place] ^= 1 << int(draw.integers(8))
        return bytes(changed)
    middle = [
        b"",
        b"",
        data[place : place + length] * 2,
        draw.bytes(length),
    ][kind - 1]
    return data[:place] + middle + (b"" if kind == 1 else data[place + length :])


@pytest.mark.parametrize("name", ["manifest.json", "completed/shard-00001.json"])
def test_random_corruptions_are_detected(config: EncodeConfig, name: str) -> None:
    encode(config)
    read: Callable[[], object] = lambda: (  # noqa: E731
        read_manifest(config.output)
        if name == "manifest.json"
        else read_marker(config.output, "shard-00001")
    )
    path = Path(config.output, name)
    intact, value = path.read_bytes(), read()
    draw = np.random.default_rng(0)
    errors = []
    for _ in range(NUM_CORRUPTIONS):
        path.write_bytes(corrupt(intact, draw))
        try:
            assert read() == value
            assert json.loads(path.read_bytes()) == json.loads(intact)  # blanks between tokens
        except ShardError as error:
            errors.append(str(error))
    assert len(errors) > 0.9 * NUM_CORRUPTIONS
    assert all(str(path) in error and "\n" not in error for error in errors)


def test_a_marker_under_another_shards_name_is_refused(config: EncodeConfig) -> None:
    encode(config)
    markers = Path(config.output, "completed")
    (markers / "shard-00000.json").write_bytes((markers / "shard-00001.json").read_bytes())
    with pytest.raises(ShardError, match=r"shard-00000\.json: marker of shard-00001"):
        read_marker(config.output, "shard-00000")
