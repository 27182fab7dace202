"""The verb `scenes`: drawn image sets in the layout of COCO, or in class folders."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ifvit.errors import UserError
from ifvit.scenes.captions import write_captions
from ifvit.scenes.config import ScenesConfig
from ifvit.scenes.drawings import (
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    MAX_COUNT,
    Group,
    PlacedObject,
    RenderedScene,
    Scene,
    encode_jpeg,
    render_sampled_scene,
    render_scene,
)
from ifvit.storage import read_json, write_json

# Image ids of a split start behind this multiple of _SPLIT_CAPACITY, so no two splits share one.
_SPLITS = {"train2014": 0, "val2014": 1, "train2017": 2, "val2017": 3}
_SPLIT_CAPACITY = 1_000_000
_DESCRIPTION = "ifvit scenes"
_DRAWING_VERSION = "1"  # to be raised when the same seed no longer gives the same files
_LICENSE = {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/"}
_DATE = "2024-01-01 00:00:00"


def render_scene_set(folder: str | Path, split: str, num_images: int, seed: int = 0) -> None:
    """Write `folder/SPLIT/COCO_SPLIT_ID.jpg` and captions and instances below `annotations/`.

    The same arguments give the same bytes. A set that is finished is left alone; one that was
    interrupted or has other parameters is drawn from its first image (captions come last).
    Raises UserError for a folder with somebody's own images and for an unknown split.
    """
    images = Path(folder, split)
    captions, instances = (
        Path(folder, "annotations", f"{name}_{split}.json") for name in ("captions", "instances")
    )
    ids, info = image_ids(split, num_images), describe_set(split, num_images, seed)
    if not claim_set(folder, info, (captions, instances)):
        return
    drawn = {}
    for image_id in tqdm(ids, desc=f"draw {split}"):
        drawn[image_id] = render_sampled_scene(seed, image_id)
        jpeg = encode_jpeg(drawn[image_id].image)
        (images / _file_name(split, image_id)).write_bytes(jpeg)
    shared = {"info": info, "licenses": [_LICENSE]}
    shared["images"] = [_image_record(split, image_id) for image_id in drawn]
    categories = [
        {"supercategory": "shape", "id": i, "name": kind} for i, kind in enumerate(KINDS, start=1)
    ]
    objects = shared | {"annotations": _instance_records(drawn), "categories": categories}
    write_json(str(instances), objects)
    write_json(str(captions), shared | {"annotations": _caption_records(drawn)})


def image_ids(split: str, num_images: int) -> range:
    """Ids that no other split has. Raises UserError for an unknown split or too many images."""
    if split not in _SPLITS or not 0 < num_images < _SPLIT_CAPACITY:
        known = ", ".join(_SPLITS)
        raise UserError(
            f"scenes {split}, {num_images} images: need a split of {known} and 1..999999"
        )
    first = _SPLITS[split] * _SPLIT_CAPACITY + 1
    return range(first, first + num_images)


def claim_set(folder: str | Path, info: dict[str, Any], results: tuple[Path, ...]) -> bool:
    """Empty the set's folder for drawing; False when `results`, written last, are there already.

    `annotations/scenes_SPLIT.json`, written first, marks the set as drawn. Raises UserError for a
    folder with images of another origin.
    """
    split = info["split"]
    images, claim = Path(folder, split), Path(folder, "annotations", f"scenes_{split}.json")
    is_claimed = claim.exists()
    if not is_claimed and (any(result.exists() for result in results) or any(images.glob("*"))):
        raise UserError(f"{images}: holds images of another origin; choose another folder")
    if results[0].exists() and is_claimed and read_json(str(claim)) == info:
        return False
    for stale in (*results, *images.rglob("*.jpg")):
        stale.unlink(missing_ok=True)
    write_json(str(claim), info)
    images.mkdir(parents=True, exist_ok=True)
    return True


def describe_set(split: str, num_images: int, seed: int) -> dict[str, Any]:
    """COCO's `info` object, which also decides the files."""
    return {
        "description": _DESCRIPTION,
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


def _image_record(split: str, image_id: int) -> dict[str, Any]:
    return {
        "license": _LICENSE["id"],
        "file_name": _file_name(split, image_id),
        "coco_url": "",
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "date_captured": _DATE,
        "flickr_url": "",
        "id": image_id,
    }


def _caption_records(drawn: dict[int, RenderedScene]) -> list[dict[str, Any]]:
    pairs = [(i, text) for i, one in drawn.items() for text in write_captions(one.scene)]
    first = _first_annotation_id(drawn)
    return [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(pairs, first)]


def _instance_records(drawn: dict[int, RenderedScene]) -> list[dict[str, Any]]:
    pairs = [(i, placed) for i, one in drawn.items() for placed in one.objects]
    first = _first_annotation_id(drawn)
    return [_instance_record(n, i, placed) for n, (i, placed) in enumerate(pairs, first)]


def _first_annotation_id(drawn: dict[int, RenderedScene]) -> int:
    """Ten ids an image: no two splits share an annotation id either."""
    return 10 * min(drawn)


def _instance_record(annotation_id: int, image_id: int, placed: PlacedObject) -> dict[str, Any]:
    width, height = placed.extent
    box = (placed.x - width / 2, placed.y - height / 2, width, height)
    return {
        "segmentation": [[round(value, 2) for corner in placed.outline for value in corner]],
        "area": round(placed.area, 2),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [round(value, 2) for value in box],
        "category_id": KINDS.index(placed.kind) + 1,
        "id": annotation_id,
        "colour": placed.colour,
    }


def class_scenes() -> dict[str, Scene]:
    """The 75 classes by name, `two_red_circles`, which is a caption but for the underscores."""
    groups = itertools.product(range(1, MAX_COUNT + 1), COLOURS, KINDS)
    scenes = [Scene(first=Group(count=n, colour=colour, kind=kind)) for n, colour, kind in groups]
    return {write_captions(scene)[0].replace(" ", "_"): scene for scene in scenes}


def render_class_set(folder: str | Path, split: str, num_images: int, seed: int = 0) -> None:
    """Write `folder/SPLIT/CLASS/ID.jpg`, of every class in turn, as the `folder` source reads them.

    The same arguments give the same bytes, and a finished set is left alone:
    `annotations/classes_SPLIT.json` comes last. Raises UserError for a folder with somebody's own
    images and for an unknown split.
    """
    names, scenes = zip(*class_scenes().items(), strict=True)
    ids = image_ids(split, num_images)
    done = Path(folder, "annotations", f"classes_{split}.json")
    info = describe_set(split, num_images, seed) | {"classes": True}
    if not claim_set(folder, info, (done,)):
        return
    for name in names:
        Path(folder, split, name).mkdir(exist_ok=True)
    for number, image_id in enumerate(tqdm(ids, desc=f"draw {split}")):
        choice = number % len(names)
        drawn = render_scene(scenes[choice], np.random.default_rng((seed, image_id)))
        path = Path(folder, split, names[choice], f"{image_id:012d}.jpg")
        path.write_bytes(encode_jpeg(drawn.image))
    write_json(str(done), {"info": info, "classes": sorted(names)})


def render_scenes(config: ScenesConfig) -> None:
    """Draw the set, in COCO's layout or in class folders."""
    draw = render_class_set if config.classes else render_scene_set
    draw(config.folder, config.split, config.num_images, config.seed)
