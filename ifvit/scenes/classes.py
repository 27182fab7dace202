"""Drawn images in class folders: one group each, the class says its count, colour and kind."""

import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ifvit.scenes.captions import write_captions
from ifvit.scenes.coco import claim_set, describe_set, image_ids
from ifvit.scenes.draw import draw_scene, encode_jpeg
from ifvit.scenes.layout import COLOURS, KINDS, MAX_COUNT, Group, Scene
from ifvit.storage import write_json


def class_scenes() -> dict[str, Scene]:
    """The 75 classes by name, `two_red_circles`, which is a caption but for the underscores."""
    groups = itertools.product(range(1, MAX_COUNT + 1), COLOURS, KINDS)
    scenes = [Scene(first=Group(count=n, colour=colour, kind=kind)) for n, colour, kind in groups]
    return {write_captions(scene)[0].replace(" ", "_"): scene for scene in scenes}


def draw_class_set(folder: str | Path, split: str, num_images: int, seed: int = 0) -> None:
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
        drawn = draw_scene(scenes[choice], np.random.default_rng((seed, image_id)))
        path = Path(folder, split, names[choice], f"{image_id:012d}.jpg")
        path.write_bytes(encode_jpeg(drawn.image))
    write_json(str(done), {"info": info, "classes": sorted(names)})
