"""Where captions come from: sources of several columns, keys or suffixes, up to the shards."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from encoded_files import finish, hashes, image_files, undisturbed_hashes, without_markers
from PIL import Image

from data_pipeline.config import EncodeConfig, MergeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import merge, verify
from data_pipeline.sources import open_source
from data_pipeline.sources.base import CaptionedImage, ListedSource
from ifvit.errors import UserError
from ifvit.models.autoencoders import Autoencoder
from ifvit.shards.format import read_manifest
from ifvit.shards.reader import ShardReader

Texts = dict[str, str | list[str] | None]
ROWS: list[Texts] = [
    {"short": "a fox", "long": ["a red fox", "a fox that runs"]},
    {"short": None, "long": ["a dog on a beach"]},
    {"short": "   ", "long": ["a cat"]},
    {"short": "a bird", "long": None},
]
EXPECTED = [
    (("a red fox", "a fox that runs", "a fox"), (0, 0, 1)),
    (("a dog on a beach",), (0,)),
    (("a cat",), (0,)),
    (("a bird",), (1,)),
]
"""Captions and numbers of their sources, in the order of `long,short`."""


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(folder: Path, config: EncodeConfig) -> EncodeConfig:
    for number in range(len(ROWS)):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    rows = [{"path": f"{n}.png", **texts} for n, texts in enumerate(ROWS)]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return replace(config, source="table", captions=str(folder / "table.jsonl"))


def write_parquet(folder: Path, config: EncodeConfig) -> EncodeConfig:
    columns = {name: [texts[name] for texts in ROWS] for name in ("short", "long")}
    table = pyarrow.table({"image": [image_bytes(n) for n in range(len(ROWS))], **columns})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    return replace(config, source="parquet", captions=None)


def write_tar(folder: Path, config: EncodeConfig) -> EncodeConfig:
    """The short captions are members of their own, the long ones a list in the JSON file."""
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, texts in enumerate(ROWS):
            members = {"png": image_bytes(number), "json": json.dumps({"long": texts["long"]})}
            if texts["short"] is not None:
                members["short"] = str(texts["short"])
            for suffix, content in members.items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return replace(config, source="webdataset", captions=None)


def write_texts(folder: Path, config: EncodeConfig) -> EncodeConfig:
    for number, texts in enumerate(ROWS):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
        for name, text in texts.items():
            if text is not None:
                lines = text if isinstance(text, list) else [text]
                (folder / f"{number}.{name}").write_text("\n".join(lines))
    return replace(config, source="captioned_folder", captions=None)


Write = Callable[[Path, EncodeConfig], EncodeConfig]


@pytest.fixture
def recipe(config: EncodeConfig, tmp_path: Path) -> EncodeConfig:
    (tmp_path / "named").mkdir()
    return replace(config, images=str(tmp_path / "named"), caption_key="long, short")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_tar, write_texts])
def test_shards_say_where_each_caption_comes_from(recipe: EncodeConfig, write: Write) -> None:
    recipe = write(Path(recipe.images), recipe)
    assert finish(recipe).caption_sources == ("long", "short")
    verify(ShardsConfig(url=recipe.output))
    reader = ShardReader(recipe.output)
    found = [reader.metadata(sample) for sample in range(4)]
    assert [(each.captions, each.sources) for each in found] == EXPECTED
    numbers = reader.caption_sources(np.arange(4))
    assert [tuple(each.tolist()) for each in numbers] == [sources for _, sources in EXPECTED]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_tar, write_texts])
def test_a_single_column_has_no_name_of_a_source(recipe: EncodeConfig, write: Write) -> None:
    recipe = write(Path(recipe.images), replace(recipe, caption_key="long", tolerate=1))
    assert finish(recipe).caption_sources == ()
    verify(ShardsConfig(url=recipe.output))
    assert [ShardReader(recipe.output).metadata(n).sources for n in range(3)] == [()] * 3


def test_other_names_of_sources_are_another_job(recipe: EncodeConfig) -> None:
    recipe = write_jsonl(Path(recipe.images), recipe)
    finish(recipe)
    for key in ("short,long", "long"):
        with pytest.raises(UserError, match="caption_sources is"):
            encode(replace(recipe, caption_key=key))


def test_a_caption_that_moves_to_another_column_is_encoded_again_without_the_vae(
    recipe: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_jsonl(Path(recipe.images), recipe)
    finish(recipe)
    table = Path(str(recipe.captions))
    bird = '{"path": "3.png", "short": null, "long": "a bird"}'
    table.write_text("\n".join([*table.read_text().splitlines()[:3], bird]))
    expected = without_markers(undisturbed_hashes(recipe))
    monkeypatch.setattr(Autoencoder, "encode", None)  # a call would fail
    finish(recipe)
    assert without_markers(hashes(recipe)) == expected
    assert ShardReader(recipe.output).metadata(3).sources == (0,)


def test_datasets_of_other_caption_sources_are_not_merged(
    recipe: EncodeConfig, tmp_path: Path
) -> None:
    recipe = write_jsonl(Path(recipe.images), recipe)
    other = replace(recipe, caption_key="short,long", output=recipe.output + "_other")
    for config in (recipe, other):
        finish(config)
    merged = MergeConfig(urls=[recipe.output, other.output], output=str(tmp_path / "merged"))
    with pytest.raises(UserError, match="they differ in caption_sources"):
        merge(merged)


class NamedCaptions(ListedSource):
    """A source of a user that names where its captions come from."""

    classes = ()
    caption_sources = ("person", "model")
    wrong_number = False

    def __init__(self, images: str, captions: str | None) -> None:
        super().__init__(
            [
                CaptionedImage(
                    key=path.stem,
                    image_id=path.stem,
                    name=path.name,
                    read=path.read_bytes,
                    captions=("by a model", "by a person"),
                    sources=(1, 2 if self.wrong_number else 0),
                    file=str(path),
                )
                for path in sorted(Path(images).iterdir())
            ]
        )

    def report(self) -> str:
        return self.counts()


def test_a_source_of_a_user_names_its_caption_sources(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{NamedCaptions.__module__}:NamedCaptions"
    own = replace(config, source=name, allow_plugins=True, captions=None)
    finish(own)
    reader = ShardReader(own.output)
    assert read_manifest(own.output).caption_sources == ("person", "model")
    assert reader.metadata(0).sources == (1, 0)
    source = type(open_source(own))
    monkeypatch.setattr(source, "wrong_number", True)
    with pytest.raises(
        UserError, match=f"{image_files(config)[0].name}: sources .*'person', 'model'"
    ):
        encode(replace(own, output=config.output + "_wrong"))
    with pytest.raises(UserError, match="2 captions and 1 sources"):
        CaptionedImage(key="k", image_id=1, name="k", captions=("a", "b"), sources=(0,))
