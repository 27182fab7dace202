"""The verb `scenes`: sets of rendered scenes on disk, in COCO's layout or in class folders.

The demo and the test suite call `render_scene_set` and `render_class_set` directly.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ifvit.errors import UserError
from ifvit.records import path_inside
from ifvit.scenes import ScenesConfig
from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import (
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    MAX_COUNT,
    Group,
    Scene,
    encode_jpeg,
    render_sampled_scene,
    render_scene,
)
from ifvit.storage import read_sealed, write_json, write_sealed

# Image ids of a split start behind this multiple of _SPLIT_CAPACITY: no two splits share an id.
_SPLITS = {"train2014": 0, "val2014": 1, "train2017": 2, "val2017": 3}
_SPLIT_CAPACITY = 1_000_000
_DRAWING_VERSION = "1"  # increase it when the same seed gives other files


def render_scenes(config: ScenesConfig) -> None:
    """Render the set that the verb `scenes` describes."""
    render = render_class_set if config.classes else render_scene_set
    render(config.folder, config.split, config.num_images, config.seed)


def render_scene_set(folder: str | Path, split: str, num_images: int, seed: int = 0) -> None:
    """Write `folder/SPLIT/COCO_SPLIT_ID.jpg` and `annotations/captions_SPLIT.json`.

    Equal arguments give equal bytes. A finished set is left alone; an interrupted set or one with
    other arguments is rendered again from its first image. The captions file, written last, marks
    the set as finished. Raises UserError for an unknown split and for a folder with other images.
    """
    ids, info = _image_ids(split, num_images), _describe(split, num_images, seed)
    captions = Path(folder, "annotations", f"captions_{split}.json")
    if not _start_set(folder, info, captions):
        return
    texts = []
    for image_id in tqdm(ids, desc=f"render {split}"):
        rendered = render_sampled_scene(seed, image_id)
        path = Path(folder, split, _file_name(split, image_id))
        path.write_bytes(encode_jpeg(rendered.image))
        texts += [(image_id, text) for text in write_captions(rendered.scene)]
    records = [
        {"image_id": image_id, "id": number, "caption": text}
        for number, (image_id, text) in enumerate(texts, start=10 * ids[0])  # unlike other splits
    ]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = [{"id": one, "file_name": _file_name(split, one), **size} for one in ids]
    write_json(str(captions), {"info": info, "images": images, "annotations": records})


def render_class_set(folder: str | Path, split: str, num_images: int, seed: int = 0) -> None:
    """Write `folder/SPLIT/CLASS/ID.jpg`, one image of each class in turn.

    The `folder` source of the encode job reads this layout. `annotations/classes_SPLIT.json`,
    written last, marks the set as finished; all else is as in `render_scene_set`.
    """
    ids = _image_ids(split, num_images)
    info = _describe(split, num_images, seed) | {"classes": True}
    finished = Path(folder, "annotations", f"classes_{split}.json")
    if not _start_set(folder, info, finished):
        return
    names, scenes = zip(*class_scenes().items(), strict=True)
    for name in names:
        path_inside(Path(folder), f"{split}/{name}").mkdir(exist_ok=True)
    for number, image_id in enumerate(tqdm(ids, desc=f"render {split}")):
        choice = number % len(names)
        rendered = render_scene(scenes[choice], np.random.default_rng((seed, image_id)))
        path = Path(folder, split, names[choice], f"{image_id:012d}.jpg")
        path.write_bytes(encode_jpeg(rendered.image))
    write_json(str(finished), {"info": info, "classes": sorted(names)})


def class_scenes() -> dict[str, Scene]:
    """The 75 classes by name; `two_red_circles` is a caption with underscores for spaces."""
    groups = itertools.product(range(1, MAX_COUNT + 1), COLOURS, KINDS)
    scenes = [Scene(first=Group(count=n, colour=colour, kind=kind)) for n, colour, kind in groups]
    return {write_captions(scene)[0].replace(" ", "_"): scene for scene in scenes}


def _image_ids(split: str, num_images: int) -> range:
    if split not in _SPLITS or not 0 < num_images < _SPLIT_CAPACITY:
        known = ", ".join(_SPLITS)
        raise UserError(
            f"scenes {split}, {num_images} images: need a split of {known} and 1..999999 images"
        )
    first = _SPLITS[split] * _SPLIT_CAPACITY + 1
    return range(first, first + num_images)


def _start_set(folder: str | Path, info: dict[str, Any], result: Path) -> bool:
    """Empty the folder of the set => True; False when the set is finished already.

    `annotations/scenes_SPLIT.json` with `info` and its seal, written first, marks the folder as
    ours, and `result` is written last. Only files with names of the set are deleted. Raises
    UserError for a folder with images of another origin, and for links out of it.
    """
    split = info["split"]
    images = path_inside(Path(folder), split)
    mark = path_inside(Path(folder), f"annotations/scenes_{split}.json")
    is_ours = mark.exists()
    if not is_ours and (result.exists() or any(images.glob("*"))):
        raise UserError(f"{images}: holds images of another origin; choose another folder")
    if is_ours and read_sealed(dict[str, Any], str(mark)) == info and result.exists():
        return False
    result.unlink(missing_ok=True)
    for stale in images.rglob("*.jpg"):
        if re.fullmatch(rf"(COCO_{split}_)?[0-9]{{12}}\.jpg", stale.name):
            stale.unlink()
    write_sealed(str(mark), info)
    images.mkdir(parents=True, exist_ok=True)
    return True


def _describe(split: str, num_images: int, seed: int) -> dict[str, Any]:
    """COCO's `info` object, with the arguments that decide the files."""
    return {
        "description": "ifvit scenes",
        "url": "",
        "version": _DRAWING_VERSION,
        "year": 2024,
        "contributor": "ifvit",
        "date_created": "2024/01/01",
        "split": split,
        "num_images": num_images,
        "seed": seed,
    }


def _file_name(split: str, image_id: int) -> str:
    return f"COCO_{split}_{image_id:012d}.jpg"
