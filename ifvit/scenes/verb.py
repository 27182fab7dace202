"""The verb `scenes`."""

from ifvit.scenes.classes import draw_class_set
from ifvit.scenes.coco import draw_scene_set
from ifvit.scenes.config import ScenesConfig


def draw_scenes(config: ScenesConfig) -> None:
    """Draw the set, in COCO's layout or in class folders."""
    draw = draw_class_set if config.classes else draw_scene_set
    draw(config.folder, config.split, config.num_images, config.seed)
