"""Helpers for tests of the encode job: run it, and look at its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.shard_io import write_shard
from ifvit.shards.format import Manifest
from ifvit.storage import sha256_of


def finish(config: EncodeConfig) -> Manifest:
    """Run the encode job, which must finish the dataset."""
    manifest = encode(config)
    assert manifest is not None
    return manifest


def hashes(config: EncodeConfig) -> dict[str, str]:
    """Hash of every file of the output by relative path, hidden files included."""
    folder = Path(config.output)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def without_markers(found: dict[str, str]) -> dict[str, str]:
    """Hashes of the data set itself; markers hold the times of the input files."""
    return {name: value for name, value in found.items() if not name.startswith("completed")}


def undisturbed_hashes(config: EncodeConfig) -> dict[str, str]:
    """Hashes after one process has encoded the same dataset into a folder of its own."""
    config = replace(config, output=config.output + "_undisturbed")
    finish(config)
    return hashes(config)


def image_files(config: EncodeConfig) -> list[Path]:
    """The images in the order of the COCO source."""
    return sorted(Path(config.images).iterdir())


def truncate(path: Path) -> bytes:
    """Cut a file in half and return its former content."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def record_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written from now on."""
    names: list[str] = []

    def record(folder: str, name: str, samples: Any) -> Any:
        names.append(name)
        return write_shard(folder, name, samples)

    monkeypatch.setattr("data_pipeline.shard_io.write_shard", record)
    return names


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))
