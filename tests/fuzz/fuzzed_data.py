"""Small data sets and the user's own files, and how the program reads each."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from made_contexts import make_captioned, write_contexts
from made_shards import make_samples, write_shards
from made_text_encoders import make_text_encoder
from mutations import Format
from PIL import Image

from data_pipeline.completion import (
    CompletionMarker,
    Job,
    LatentSums,
    UnitIdentity,
    marker_url,
    read_marker,
    write_marker,
)
from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig, SizeLimits, StatsConfig
from data_pipeline.shard_tools import inspect_shards, stats, verify
from data_pipeline.sources import open_source
from ifvit.config import read_config
from ifvit.evaluation.object_count import (
    read_count_prompts,
)
from ifvit.image_rules import ImageRules
from ifvit.images import read_square
from ifvit.models.text_encoders import load_text_encoder
from ifvit.sampling.generate import read_prompt_file
from ifvit.shards.format import TextSettings
from ifvit.shards.reader import ShardReader

CONTEXT = (3, 8)
MOMENTS = (8, 4, 4)


def make_shards(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    samples = make_samples(4, moments_shape=MOMENTS, context_shape=CONTEXT)
    write_shards(folder, samples, (2, 2))
    return [_shards("shards", folder, file) for file in ("manifest.json", "null_context.npy")]


def make_8_bit_shards(folder: Path) -> list[Format]:
    """Contexts of different lengths in 8 bits, and named sources of captions."""
    encoder = load_text_encoder(make_text_encoder("t5", folder.with_name("t5")))
    write_contexts(folder, make_captioned(4), (2, 2), encoder, "int8")
    files = ("manifest.json", "shard-00000.index.npz", "shard-00000.tar")
    return [_shards("8-bit shards", folder, file) for file in files]


def _shards(kind: str, folder: Path, file: str) -> Format:
    return Format(
        name=f"{kind} {file}", folder=folder, file=file, sealed=True,
        readers=(read_shards, verify_shards, show_shards),
        hashed_in=() if file == "manifest.json" else ("manifest.json",),
    )  # fmt: skip


def read_shards(box: Path) -> object:
    reader = ShardReader(str(box))
    numbers = np.arange(len(reader))
    moments = np.empty((len(reader), *reader.manifest.moments_shape), reader.dtype)
    reader.read_moments(numbers, moments)
    captions = [reader.metadata(number) for number in numbers]
    contexts = [reader.context(number, 0) for number in numbers]
    return reader.manifest, moments, captions, contexts, reader.null_context


def verify_shards(box: Path) -> object:
    return verify(ShardsConfig(url=str(box), num_workers=1))


def show_shards(box: Path) -> object:
    inspect_shards(InspectConfig(url=str(box)))
    return stats(StatsConfig(url=str(box), num_workers=1))


def make_marker(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    samples = make_samples(2, moments_shape=MOMENTS, context_shape=CONTEXT)
    (entry,) = write_shards(folder, samples, (2,)).shards
    job = Job(
        source_sha256="0" * 64, vae_sha256="1" * 64, text_encoder_sha256="2" * 64, image_size=32,
        text=TextSettings(), int8_context=False, caption_sources=(),
        dtype="float16", precision="fp32", samples_per_shard=2, flip=False,
        image_rules=ImageRules(),
    )  # fmt: skip
    sums = LatentSums(count=64, first=(3.0, 0.0, 0.0, 1.0), second=(300.0, 1.0, 2.0, 3.0))
    unit = UnitIdentity(files_sha256="3" * 64, images_sha256="4" * 64, texts_sha256="5" * 64)
    marker = CompletionMarker(
        job=job, unit=unit, shard=entry, failures=(), latent_sums=sums,
        size_limits=SizeLimits(min_side=16, max_aspect_ratio=None),
    )  # fmt: skip
    write_marker(str(folder), marker)
    file = Path(marker_url("", entry.name)).relative_to("/").as_posix()
    return [
        Format(name="completion marker", folder=folder, file=file, readers=(read_marked,),
               sealed=True)
    ]  # fmt: skip


def read_marked(box: Path) -> object:
    return read_marker(str(box), "shard-00000")


def _image_bytes(format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def make_captions(folder: Path) -> list[Format]:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        name = f"COCO_train2014_{number:012d}.jpg"
        (folder / "images" / name).write_bytes(_image_bytes())
        images.append({"id": number, "file_name": name, "width": 20, "height": 24})
        annotations.append({"id": number, "image_id": number, "caption": f"caption {number}"})
    content = {"info": {"year": 2014}, "images": images, "annotations": annotations}
    (folder / "captions_train2014.json").write_text(json.dumps(content))
    return [
        Format(name="COCO captions", folder=folder, file="captions_train2014.json",
               readers=(open_coco,), sealed=False)
    ]  # fmt: skip


def open_coco(box: Path) -> object:
    return _open("coco", box, str(box / "images"), str(box / "captions_train2014.json"))


def _open(source: str, box: Path, images: str, captions: str | None) -> object:
    """All that the encode job takes from a source; an image that cannot be read is left out."""
    opened = open_source(
        EncodeConfig(
            source=source, images=images, captions=captions, output="out", vae="scenes/vae"
        )
    )  # fmt: skip
    found = []
    for unit in opened.units(2):
        for image in unit.open():
            try:
                pixels = read_square(image.read(), 8, ImageRules()).pixels
            except Exception as error:
                pixels = type(error).__name__  # type: ignore[assignment]
            found.append((image.key, image.image_id, image.captions, pixels))
    return opened.sha256, opened.report().replace(str(box), ""), found


def make_tables(folder: Path) -> list[Format]:
    from pyarrow import Table, parquet

    (folder / "images").mkdir(parents=True)
    rows = [{"path": f"{number}.jpg", "caption": f"caption {number}"} for number in range(3)]
    for row in rows:
        (folder / "images" / row["path"]).write_bytes(_image_bytes())
    lines = ["path,caption", *(f'{row["path"]},"{row["caption"]}"' for row in rows)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(Table.from_pylist(rows), folder / "table.parquet")

    def reader(name: str) -> Callable[[Path], object]:
        def open_table(box: Path) -> object:
            return _open("table", box, str(box / "images"), str(box / name))

        return open_table

    return [
        Format(name=name, folder=folder, file=name, readers=(reader(name),), sealed=False)
        for name in ("table.csv", "table.jsonl", "table.parquet")
    ]


def make_tars(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        members = {"a.jpg": _image_bytes(), "a.txt": b"a caption", "b.jpg": _image_bytes()}
        members["b.json"] = b'{"caption": "another"}'
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "00000_stats.json").write_text('{"successes": 2}')
    return [
        Format(name=name, folder=folder, file=file, readers=(open_tars,), sealed=False)
        for name, file in (("input tar", "00000.tar"), ("tar statistics", "00000_stats.json"))
    ]


def open_tars(box: Path) -> object:
    return _open("webdataset", box, str(box), None)


def make_prompts(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    rows = [{"prompt": f"{n} apples", "object": "apple", "count": n} for n in range(1, 4)]
    (folder / "counts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["prompt,object,count", *(f"{row['prompt']},apple,{row['count']}" for row in rows)]
    (folder / "counts.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    readers = {"counts.jsonl": count_rows, "counts.csv": count_cells, "prompts.txt": prompt_lines}
    return [
        Format(name=f"prompts {name}", folder=folder, file=name, readers=(read,), sealed=False)
        for name, read in readers.items()
    ]


def count_rows(box: Path) -> object:
    return read_count_prompts(str(box / "counts.jsonl"))


def count_cells(box: Path) -> object:
    return read_count_prompts(str(box / "counts.csv"))


def prompt_lines(box: Path) -> object:
    return read_prompt_file(str(box / "prompts.txt"))


def make_recipes(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    text = "images: i\ncaptions: c.json\noutput: o\nvae: scenes/vae\nimage_size: 64\nflip: true\n"
    (folder / "encode.yaml").write_text(text)
    return [
        Format(name="recipe", folder=folder, file="encode.yaml", readers=(read_recipe,),
               sealed=False)
    ]  # fmt: skip


def read_recipe(box: Path) -> object:
    flags = ["--config", str(box / "encode.yaml")]
    return read_config(EncodeConfig, flags, prog="ifvit encode")


def make_images(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    for format in ("JPEG", "PNG", "WEBP"):
        (folder / f"image.{format.lower()}").write_bytes(_image_bytes(format))

    def reader(name: str) -> Callable[[Path], object]:
        def read_image(box: Path) -> object:
            from ifvit.evaluation.references import RealImages

            images = RealImages(paths=(), image_size=16, rules=ImageRules())
            return images.read(box / name)

        return read_image

    names = ("image.jpeg", "image.png", "image.webp")
    return [
        Format(name=name, folder=folder, file=name, readers=(reader(name),), sealed=False)
        for name in names
    ]


DATA = (
    make_shards,
    make_8_bit_shards,
    make_marker,
    make_captions,
    make_tables,
    make_tars,
    make_prompts,
    make_recipes,
    make_images,
)
