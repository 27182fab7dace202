"""Random damage to the input of a source gives images, named failures, or one line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_tars import make_sample, write_tar

from data_pipeline.config import EncodeConfig
from data_pipeline.sources import open_source
from data_pipeline.units import open_unit, read_or_fail
from ifvit.errors import UserError

NUM_MUTATIONS = 300


def mutations(data: bytes) -> Iterator[bytes]:
    """Flip, cut, repeat and replace bytes, each time in another way."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_MUTATIONS):
        damaged = bytearray(data)
        for position in generator.integers(0, len(data), generator.integers(1, 8)):
            damaged[position] = generator.choice(
                [0, 255, ord("9"), ord("{"), ord('"'), ord("/"), generator.integers(256)]
            )
        start, end = sorted(generator.integers(0, len(data), 2))
        if generator.random() < 0.3:
            damaged[start:end] = damaged[start:end] * generator.integers(0, 3)
        yield bytes(damaged)


def make_table(path: Path, config: EncodeConfig) -> EncodeConfig:
    names = sorted(file.name for file in Path(config.images).iterdir())
    rows = [{"path": name, "caption": f"photo {name}"} for name in names]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("path,caption\n" + "\n".join(",".join(row.values()) for row in rows))
    return replace(config, source="table", captions=str(path))


def make_tar(path: Path, config: EncodeConfig) -> EncodeConfig:
    images = sorted(Path(config.images).iterdir())[:3]
    members = {k: v for n, image in enumerate(images) for k, v in make_sample(image, n).items()}
    write_tar(path, members)
    return replace(config, source="webdataset", images=str(path), captions=None)


def make_parquet(path: Path, config: EncodeConfig) -> EncodeConfig:
    images = sorted(Path(config.images).iterdir())[:3]
    rows = [{"image": {"bytes": image.read_bytes()}, "caption": ["x"]} for image in images]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return replace(config, source="parquet", images=str(path), captions=None)


def make_texts(path: Path, config: EncodeConfig) -> EncodeConfig:
    for image in Path(config.images).iterdir():
        image.rename(path.with_name(image.name))
        path.with_name(image.name).with_suffix(".txt").write_text("one\ntwo")
    path.write_text("one\ntwo")
    return replace(config, source="captioned_folder", images=str(path.parent), captions=None)


def make_coco(path: Path, config: EncodeConfig) -> EncodeConfig:
    path.write_bytes(Path(str(config.captions)).read_bytes())
    return replace(config, captions=str(path))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("t.csv", make_table),
        ("t.jsonl", make_table),
        ("t.parquet", make_table),
        ("t.tar", make_tar),
        ("c.json", make_coco),
        ("images.parquet", make_parquet),
        ("COCO_train2014_000000000003.txt", make_texts),
    ],
)
def test_every_damage_is_an_image_a_failure_or_one_line(
    config: EncodeConfig,
    tmp_path: Path,
    name: str,
    make: Callable[[Path, EncodeConfig], EncodeConfig],
) -> None:
    path = tmp_path / name
    changed = make(path, config)
    num_opened = 0
    for data in mutations(path.read_bytes()):
        path.write_bytes(data)
        try:
            units = open_source(changed).units(4)
            images = [image for unit in units for image in open_unit(unit, changed)]
        except UserError:
            continue
        num_opened += 1
        for image in images[:2]:
            read_or_fail(image, changed)
    assert num_opened > 0
