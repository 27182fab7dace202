"""The captions of one evaluation, and the images that were drawn for them.

FOLDER/POSITION.png are the images, FOLDER/settings.json says how they were drawn,
FOLDER/samples.jsonl which caption each one shows, FOLDER/grid.png shows the first of them,
real_*.png the photographs of the same captions.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.config import ProtocolConfig
from ifvit.evaluation.references import find_image, read_reference
from ifvit.images import Pixels, encode_png, make_grid
from ifvit.randomness import Stream, draw
from ifvit.sampling.files import (
    image_name,
    image_url,
    read_images,
    write_jsonl,
)
from ifvit.scenes.score import SceneScore
from ifvit.shards import ShardReader

_NUM_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The caption that is drawn for one held-out image, and the one it is scored against."""

    position: int
    image_id: int | str
    caption: int
    """Its number among the image's captions; in a labelled set, the number of the class."""
    text: str
    score_text: str


def read_prompts(reader: ShardReader, protocol: ProtocolConfig) -> list[Prompt]:
    """The captions of the first images, or the names of their classes.

    Raises UserError when there are not that many.
    """
    count = protocol.num_samples
    if count > len(reader):
        raise UserError(
            f"{reader.url}: {len(reader)} images, num_samples asks for {count}; lower it"
        )
    if reader.manifest.classes:
        return [_name_class(reader, position) for position in range(count)]
    positions = np.arange(count)
    chosen = np.zeros(count, np.int64)
    if protocol.caption_rule == "random":
        shares = draw(protocol.sampling.seed, 0, positions, Stream.CAPTION)
        chosen = (shares * reader.caption_counts(positions)).astype(np.int64)
    prompts = []
    for position, caption in enumerate(chosen.tolist()):
        entry = reader.metadata(position)
        scored = caption if protocol.score_caption == "same" else 0
        prompts.append(
            Prompt(
                position=position,
                image_id=entry.image_id,
                caption=caption,
                text=entry.captions[caption],
                score_text=entry.captions[scored],
            )
        )
    return prompts


def _name_class(reader: ShardReader, position: int) -> Prompt:
    """What `two_red_circles` reads as a caption."""
    label = reader.label(position)
    text = reader.manifest.classes[label].replace("_", " ")
    image_id = reader.metadata(position).image_id
    return Prompt(position=position, image_id=image_id, caption=label, text=text, score_text=text)


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of which captions of which images are drawn, in order."""
    drawn = [[prompt.image_id, prompt.text] for prompt in prompts]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def write_overview(
    folder: str,
    prompts: list[Prompt],
    references: list[Path],
    image_size: int,
    scores: Sequence[SceneScore] | None,
) -> None:
    """Write samples.jsonl, grid.png and the real images of the prompts in the grid."""
    shown = prompts[:_NUM_SHOWN]
    real: dict[int, str] = {}
    for prompt in shown:
        path = find_image(references, prompt.image_id)
        if path is not None:
            real[prompt.position] = f"real_{image_name(prompt.position)}"
            pixels = read_reference(path, image_size)
            storage.write_bytes(storage.join(folder, real[prompt.position]), encode_png(pixels))
    rows = (
        {
            "file": image_name(prompt.position),
            "prompt": prompt.text,
            "position": prompt.position,
            "image_id": prompt.image_id,
            "real": real.get(prompt.position),
            "scores": asdict(scores[prompt.position]) if scores else None,
        }
        for prompt in prompts
    )
    write_jsonl(storage.join(folder, "samples.jsonl"), rows)
    grid = make_grid(next(read_samples(folder, shown, _NUM_SHOWN)), math.isqrt(len(shown)))
    storage.write_bytes(storage.join(folder, "grid.png"), encode_png(grid))


def read_samples(folder: str, prompts: list[Prompt], batch_size: int) -> Iterator[Pixels]:
    """The drawn images in the order of `prompts`, (B, H, W, 3) at a time."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield read_images(image_url(folder, prompt.position) for prompt in batch)
