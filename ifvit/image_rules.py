"""Rules by which images of every colour mode become upright 8-bit RGB images in sRGB."""

import io
from functools import lru_cache
from typing import Annotated

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageColor, ImageFile, ImageOps

from ifvit.errors import UserError
from ifvit.records import Rule, record

TURNED = "turned by their EXIF orientation"
FIRST_FRAME = "animated; only the first frame was taken"
CUT_TO_8_BITS = "16 bits per channel became the upper 8"
CONVERTED = "the colour profile was converted to sRGB"
IGNORED = "the colour profile is damaged or does not fit the image, and was ignored"
CMYK = "CMYK became RGB without a colour profile"
PLACED = "transparent pixels were placed on {}"

MAX_PROFILE_BYTES = 1 << 22
_SRGB = ImageCms.createProfile("sRGB")
_SAME = 2
"""Largest change of a pixel value by which a profile still counts as a variant of sRGB."""
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode by the colour space of a profile."""
_EXIF_ORIENTATION = 0x0112


def _is_color(value: str) -> bool:
    try:
        return len(ImageColor.getrgb(value)) == 3
    except ValueError:
        return False


Color = Annotated[str, Rule("a colour of CSS without transparency, as white or #8080ff", _is_color)]


@record
class ImageRules:
    """How the pixels of image files become RGB; a part of the identity of a dataset."""

    background: Color = "white"
    """Colour behind transparent pixels, as white or #8080ff."""
    exif_orientation: bool = True
    """Turn images upright as their EXIF data say; U-ViT does not."""
    color_profiles: bool = True
    """Convert images from their embedded ICC profile to sRGB; U-ViT does not."""

    def __str__(self) -> str:
        """Words for messages and for comparisons."""
        turned, converted = (
            "applied" if rule else "ignored"
            for rule in (self.exif_orientation, self.color_profiles)
        )
        return f"background {self.background}, EXIF {turned}, ICC profiles {converted}"


def turn_upright(image: Image.Image) -> Image.Image | None:
    """Apply the EXIF orientation; None if there is none, or one that changes nothing."""
    try:
        if image.getexif().get(_EXIF_ORIENTATION) in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raise all kinds of errors
        pass
    return None


def find_bits(image: Image.Image) -> int:
    """Bits per channel in the file of an image that is opened, but not decoded yet."""
    raw_modes: list[str] = []
    if isinstance(image, ImageFile.ImageFile) and image.format == "PNG":
        raw_modes = [str(tile.args) for tile in image.tile]
    return next((bits for bits in (2, 4, 16) for raw in raw_modes if f";{bits}" in raw), 8)


def to_rgb(image: Image.Image, rules: ImageRules, bits: int) -> tuple[Image.Image, list[str]]:
    """Convert a decoded image to RGB, and say what was changed. The image may be overwritten.

    `bits` is the result of `find_bits`. Raises UserError for a transparent colour of 16-bit RGB.
    """
    alpha = _find_alpha(image, bits)
    profile = image.info.get("icc_profile")
    image.info.pop("transparency", None)  # otherwise conversions to RGB warn
    remarks = []
    if bits == 16:
        remarks.append(CUT_TO_8_BITS)
        if image.mode == "I;16":  # Pillow would clip this to white; it cuts the other modes itself
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    rgb = None
    if profile and rules.color_profiles:
        rgb, remark = _convert_profile(image, profile)
        remarks += [remark] if remark else []
    if rgb is None:
        remarks += [CMYK] if image.mode == "CMYK" else []
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        remarks.append(PLACED.format(rules.background))
        rgb.paste(ImageColor.getrgb(rules.background), mask=ImageChops.invert(alpha))
    return rgb, remarks


def _find_alpha(image: Image.Image, bits: int) -> Image.Image | None:
    """Opacity (mode L) of an image, from its alpha channel, palette or transparent colour."""
    key = image.info.get("transparency")
    if key is not None and image.mode == "I;16":
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if key is not None and image.mode == "RGB" and bits == 16:
        raise UserError("16-bit RGB with a transparent colour; convert it to 8 bits or to RGBA")
    if key is not None and image.mode == "L" and bits < 8:  # Pillow scales the pixels only
        image.info["transparency"] = key * 255 // (2**bits - 1)
    if not image.has_transparency_data:
        return None
    has_channel = image.mode in ("RGBA", "LA", "PA")
    return (image if has_channel else image.convert("RGBA")).getchannel("A")


def _convert_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image | None, str | None]:
    """Convert an image to RGB by its profile, and say so; no image if the profile has no effect."""
    try:
        mode, transform = _load_profile(profile)
        is_grey, is_cmyk = image.mode in ("1", "L", "LA"), image.mode == "CMYK"
        if is_cmyk != (mode == "CMYK") or (mode == "L" and not is_grey):
            return None, IGNORED
        if transform is None:
            return None, None
        source = image if image.mode == mode else image.convert(mode)
        converted = ImageCms.applyTransform(source, transform, inPlace=mode == "RGB")
    except Exception:  # lcms and Pillow raise all kinds of errors for damaged profiles
        return None, IGNORED
    return converted or source, CONVERTED


@lru_cache(maxsize=8)
def _load_profile(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Mode of the images that a profile is for, and its transform; None for variants of sRGB."""
    if len(profile) > MAX_PROFILE_BYTES:
        raise UserError("a colour profile that is too large")
    loaded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _MODES[loaded.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(loaded, _SRGB, mode, "RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 levels of each channel, with 0 and 255
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        found = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
        if np.abs(found.astype(int) - colors).max() <= _SAME:
            return mode, None
    return mode, transform
