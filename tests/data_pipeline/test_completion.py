"""Completion markers and manifests: every change of their bytes is harmless or an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_files import finish

from data_pipeline.completion import marker_url, read_marker
from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards.format import ShardError, read_manifest

NUM_CORRUPTIONS = 250
READERS: dict[str, Callable[[str], object]] = {
    "manifest.json": read_manifest,
    "completed/shard-00001.json": lambda output: read_marker(output, "shard-00001"),
}


def corrupt(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip a bit, cut the end off, or drop, repeat or overwrite some bytes."""
    place, length = int(generator.integers(len(data))), int(generator.integers(1, 64))
    before, some, after = data[:place], data[place : place + length], data[place + length :]
    flipped = bytes([data[place] ^ 1 << int(generator.integers(8))]) + some[1:]
    choices = [
        before + flipped + after,
        before,
        before + after,
        before + some * 2 + after,
        before + generator.bytes(length) + after,
    ]
    return choices[generator.integers(len(choices))]


@pytest.mark.parametrize("name", READERS)
def test_random_corruptions_are_detected(config: EncodeConfig, name: str) -> None:
    finish(config)
    path, read = Path(config.output, name), READERS[name]
    intact, value = path.read_bytes(), read(config.output)
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(NUM_CORRUPTIONS):
        path.write_bytes(corrupt(intact, generator))
        try:
            assert read(config.output) == value
            assert json.loads(path.read_bytes()) == json.loads(intact)  # only white space differs
        except ShardError as error:
            errors.append(str(error))
    assert len(errors) > 0.9 * NUM_CORRUPTIONS
    assert all(str(path) in error and "\n" not in error for error in errors)


def test_a_marker_with_another_shards_name_is_an_error(config: EncodeConfig) -> None:
    finish(config)
    markers = Path(config.output, "completed")
    (markers / "shard-00000.json").write_bytes((markers / "shard-00001.json").read_bytes())
    with pytest.raises(ShardError, match=r"shard-00000\.json: marker of shard-00001"):
        read_marker(config.output, "shard-00000")


def test_markers_of_another_format_end_the_job_with_one_line(config: EncodeConfig) -> None:
    finish(config)
    where = marker_url(config.output, "shard-00001")
    content = storage.read_sealed(dict[str, Any], where)
    del content["format_version"]  # as in markers of version 0.1
    storage.write_sealed(where, content)
    remedy = "choose another output folder, or delete .* to encode again"
    with pytest.raises(UserError, match=rf"shard-00001\.json: .* another format.*{remedy}"):
        encode(config)
    assert Path(config.output, "manifest.json").exists()
