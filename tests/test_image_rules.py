"""Images of every colour mode and format, beside the pixels that each of them becomes.

Each image has 16 x 16 pixels: the quadrants top left, top right, bottom left and bottom right.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ifvit.errors import UserError
from ifvit.image_rules import (
    CMYK,
    CONVERTED,
    CUT_TO_8_BITS,
    FIRST_FRAME,
    IGNORED,
    PLACED,
    TURNED,
    ImageRules,
)
from ifvit.images import read_square
from ifvit.records import parse_value

WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)
RED, GREEN, BLUE, PINK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 127, 127)
COLORS = [RED, GREEN, BLUE, BLACK]
GREYS = [BLACK, GREY, WHITE, BLACK]
ON_WHITE = PLACED.format("white")
OFF = ImageRules(exif_orientation=False, color_profiles=False)

INKS = [(0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)]

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swap_tags(first: bytes, second: bytes) -> bytes:
    """The profile sRGB with two tags exchanged."""
    return SRGB.replace(first, b"....").replace(second, first).replace(b"....", second)


SWAPPED = swap_tags(b"rXYZ", b"gXYZ")
"""Profile of a device whose red is green, and whose green is red."""


def image_of(mode: str, quadrants: list[Any]) -> Image.Image:
    image = Image.new(mode, (16, 16))
    for number, color in enumerate(quadrants):
        left, top = 8 * (number % 2), 8 * (number // 2)
        image.paste(color, (left, top, left + 8, top + 8))
    return image


def file_of(image: Image.Image, file_format: str, **options: Any) -> bytes:
    if file_format in ("JPEG", "MPO"):
        options = {"quality": 100, "subsampling": 0} | options
    elif file_format == "WEBP":
        options = {"lossless": True, "exact": True} | options
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def made(mode: str, quadrants: list[Any], file_format: str, **options: Any) -> bytes:
    return file_of(image_of(mode, quadrants), file_format, **options)


def png(color_type: int, bits: int, quadrants: list[int], **chunks: bytes) -> bytes:
    """PNG from the number that each quadrant's pixels have, over all their channels."""
    size = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    rows = b""
    for top in (0, 2):
        pixels = [quadrants[top]] * 8 + [quadrants[top + 1]] * 8
        row = sum(pixel << size * (15 - place) for place, pixel in enumerate(pixels))
        rows += (b"\0" + row.to_bytes(2 * size, "big")) * 8
    header = struct.pack(">IIBBBBB", 16, 16, bits, color_type, 0, 0, 0)
    content = {"IHDR": header} | chunks | {"IDAT": zlib.compress(rows), "IEND": b""}
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in content.items():
        named = name.encode() + data
        file += struct.pack(">I", len(data)) + named + struct.pack(">I", zlib.crc32(named))
    return file


def palette(file_format: str, transparency: bytes | int | None) -> bytes:
    image = image_of("P", [0, 1, 2, 3])
    image.putpalette([value for color in COLORS for value in color])
    options = {} if transparency is None else {"transparency": transparency}
    return file_of(image, file_format, **options)


def animated(file_format: str) -> bytes:
    frames = [image_of("RGB", COLORS), Image.new("RGB", (16, 16), WHITE)]
    return file_of(frames[0], file_format, save_all=True, append_images=frames[1:])


def turned(orientation: int, file_format: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return made("RGB", COLORS, file_format, exif=exif)


def ycck() -> bytes:
    """Adobe's JPEG of YCCK: what Pillow writes as CMYK, with the other transform declared.

    Adobe stores Y, Cb and Cr of the inks as if they were RGB; Pillow stores 255 - value.
    """
    inks = [Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").tobytes() for ink in INKS]
    stored = [
        (*(255 - value for value in yuv), ink[3]) for yuv, ink in zip(inks, INKS, strict=True)
    ]
    data = bytearray(made("CMYK", stored, "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def profile(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """ICC profile of a device whose colours are `space`, with tags of four letters."""
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        offset = 128 + 4 + 12 * len(tags) + len(content)
        table += name.encode() + struct.pack(">II", offset, len(data))
        content += data + bytes(-len(data) % 4)
    body = table + content
    fields = (128 + len(body), b"", 0x2400000, b"prtr", space, connection, bytes(12), b"acsp")
    header = struct.pack(">I4sI4s4s4s12s4s28x3I", *fields, 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + body


LINEAR_GREY = profile(
    b"GRAY",
    b"XYZ ",
    kTRC=b"curv" + bytes(8),
    wtpt=b"XYZ " + struct.pack(">4x3I", 0xF6D6, 65536, 0xD32D),
)
"""Profile of a device whose levels are linear: 128 of 255 is half of the light."""
BLACK_INK_ONLY = profile(
    b"CMYK",
    b"Lab ",
    A2B0=b"mft1"
    + struct.pack(">4x4B9I", 4, 3, 2, 0, *(65536, 0, 0, 0) * 2, 65536)
    + bytes(range(256)) * 4
    + bytes([255, 128, 128, 0, 128, 128]) * 8
    + bytes(range(256)) * 3,
)
"""Profile of a printer whose black ink alone can be seen."""

ALPHA = [(*RED, 255), (*GREEN, 0), (*RED, 128), (*BLUE, 255)]
SHOWN = [RED, WHITE, PINK, BLUE]
GREY_ALPHA = [(0, 255), (0, 0), (255, 255), (128, 255)]
GREY_SHOWN = [BLACK, WHITE, WHITE, GREY]
DEEP = [0x0000, 0x80FF, 0xFFFF, 0x00FF]  # 16 bits per channel; the last is darker than 1 of 255
DEEP_COLORS = [0xFFFF00000000, 0x0000FFFF0000, 0x00000000FFFF, 0x000000FF0000]

CASES: dict[str, tuple[bytes, list[tuple[int, int, int]], list[str], int]] = {
    # name: (file, quadrants expected, remarks expected, tolerance)
    "RGB": (made("RGB", COLORS, "PNG"), COLORS, [], 0),
    "RGB JPEG": (made("RGB", COLORS, "JPEG"), COLORS, [], 3),
    "RGB WebP": (made("RGB", COLORS, "WEBP"), COLORS, [], 0),
    "RGB BMP": (made("RGB", COLORS, "BMP"), COLORS, [], 0),
    "grey": (made("L", [0, 128, 255, 0], "PNG"), GREYS, [], 0),
    "grey JPEG": (made("L", [0, 128, 255, 0], "JPEG"), GREYS, [], 3),
    "black and white": (made("1", [0, 1, 1, 0], "PNG"), [BLACK, WHITE, WHITE, BLACK], [], 0),
    "2 bits": (png(0, 2, [0, 1, 3, 0]), [BLACK, (85, 85, 85), WHITE, BLACK], [], 0),
    "RGBA": (made("RGBA", ALPHA, "PNG"), SHOWN, [ON_WHITE], 0),
    "RGBA WebP": (made("RGBA", ALPHA, "WEBP"), SHOWN, [ON_WHITE], 0),
    "opaque RGBA": (made("RGBA", [(*c, 255) for c in COLORS], "PNG"), COLORS, [], 0),
    "RGB with a transparent colour": (
        made("RGB", COLORS, "PNG", transparency=GREEN),
        [RED, WHITE, BLUE, BLACK],
        [ON_WHITE],
        0,
    ),
    "grey with alpha": (made("LA", GREY_ALPHA, "PNG"), GREY_SHOWN, [ON_WHITE], 0),
    "grey with a transparent level": (
        made("L", [0, 128, 255, 0], "PNG", transparency=128),
        [BLACK, WHITE, WHITE, BLACK],
        [ON_WHITE],
        0,
    ),
    "2 bits with a transparent level": (
        png(0, 2, [0, 1, 2, 0], tRNS=struct.pack(">H", 1)),
        [BLACK, WHITE, (170, 170, 170), BLACK],
        [ON_WHITE],
        0,
    ),
    "4 bits with a transparent level": (
        png(0, 4, [0, 1, 8, 0], tRNS=struct.pack(">H", 1)),
        [BLACK, WHITE, (136, 136, 136), BLACK],
        [ON_WHITE],
        0,
    ),
    "1 bit with a transparent level": (
        png(0, 1, [0, 1, 0, 0], tRNS=struct.pack(">H", 0)),
        [WHITE] * 4,
        [ON_WHITE],
        0,
    ),
    "palette": (palette("PNG", None), COLORS, [], 0),
    "palette GIF": (palette("GIF", None), COLORS, [], 0),
    "palette BMP": (palette("BMP", None), COLORS, [], 0),
    "palette with a transparent index": (
        palette("PNG", 1),
        [RED, WHITE, BLUE, BLACK],
        [ON_WHITE],
        0,
    ),
    "palette GIF with a transparent index": (
        palette("GIF", 1),
        [RED, WHITE, BLUE, BLACK],
        [ON_WHITE],
        0,
    ),
    "palette with opacities": (
        palette("PNG", bytes([128, 0, 255, 255])),
        [PINK, WHITE, BLUE, BLACK],
        [ON_WHITE],
        0,
    ),
    "16-bit grey": (png(0, 16, DEEP), GREYS, [CUT_TO_8_BITS], 0),
    "16-bit grey with a transparent level": (
        png(0, 16, DEEP, tRNS=b"\0\0"),
        [WHITE, GREY, WHITE, BLACK],
        [CUT_TO_8_BITS, ON_WHITE],
        0,
    ),
    "16-bit grey with alpha": (
        png(4, 16, [0x0000FFFF, 0x00000000, 0xFFFFFFFF, 0x80FFFFFF]),
        GREY_SHOWN,
        [CUT_TO_8_BITS, ON_WHITE],
        0,
    ),
    "16-bit RGB": (png(2, 16, DEEP_COLORS), COLORS, [CUT_TO_8_BITS], 0),
    "16-bit RGBA": (
        png(6, 16, [0xFFFF00000000FFFF, 0x0000FFFF00000000, 0xFFFF000000008000, 0xFFFFFFFF]),
        SHOWN,
        [CUT_TO_8_BITS, ON_WHITE],
        0,
    ),
    "CMYK JPEG": (made("CMYK", INKS, "JPEG"), COLORS, [CMYK], 3),
    "YCCK JPEG": (ycck(), COLORS, [CMYK], 4),
    "profile sRGB": (made("RGB", COLORS, "PNG", icc_profile=SRGB), COLORS, [], 0),
    "profile": (
        made("RGB", COLORS, "PNG", icc_profile=SWAPPED),
        [GREEN, RED, BLUE, BLACK],
        [CONVERTED],
        1,
    ),
    "profile JPEG": (
        made("RGB", COLORS, "JPEG", icc_profile=SWAPPED),
        [GREEN, RED, BLUE, BLACK],
        [CONVERTED],
        3,
    ),
    "profile WebP": (
        made("RGB", COLORS, "WEBP", icc_profile=SWAPPED),
        [GREEN, RED, BLUE, BLACK],
        [CONVERTED],
        1,
    ),
    "profile and alpha": (
        made("RGBA", ALPHA, "PNG", icc_profile=SWAPPED),
        [GREEN, WHITE, (127, 255, 127), BLUE],
        [CONVERTED, ON_WHITE],
        1,
    ),
    "profile of RGB in grey": (
        made("L", [0, 128, 255, 0], "PNG", icc_profile=SWAPPED),
        GREYS,
        [CONVERTED],
        1,
    ),
    "profile of RGB in CMYK": (
        made("CMYK", INKS, "JPEG", icc_profile=SWAPPED),
        COLORS,
        [IGNORED, CMYK],
        3,
    ),
    "profile of grey": (
        made("L", [0, 128, 255, 0], "PNG", icc_profile=LINEAR_GREY),
        [BLACK, (188, 188, 188), WHITE, BLACK],
        [CONVERTED],
        1,
    ),
    "profile of grey in RGB": (
        made("RGB", COLORS, "PNG", icc_profile=LINEAR_GREY),
        COLORS,
        [IGNORED],
        0,
    ),
    "profile of CMYK": (
        made("CMYK", INKS, "JPEG", icc_profile=BLACK_INK_ONLY),
        [WHITE, WHITE, WHITE, BLACK],
        [CONVERTED],
        3,
    ),
    "damaged profile": (
        made("RGB", COLORS, "PNG", icc_profile=SRGB[:200]),
        COLORS,
        [IGNORED],
        0,
    ),
    "no profile": (made("RGB", COLORS, "PNG", icc_profile=b"icc"), COLORS, [IGNORED], 0),
    "orientation 1": (turned(1), COLORS, [], 0),
    "orientation 2": (turned(2), [GREEN, RED, BLACK, BLUE], [TURNED], 0),
    "orientation 3": (turned(3), [BLACK, BLUE, GREEN, RED], [TURNED], 0),
    "orientation 4": (turned(4), [BLUE, BLACK, RED, GREEN], [TURNED], 0),
    "orientation 5": (turned(5), [RED, BLUE, GREEN, BLACK], [TURNED], 0),
    "orientation 6": (turned(6), [BLUE, RED, BLACK, GREEN], [TURNED], 0),
    "orientation 7": (turned(7), [BLACK, GREEN, BLUE, RED], [TURNED], 0),
    "orientation 8": (turned(8), [GREEN, BLACK, RED, BLUE], [TURNED], 0),
    "orientation 9": (turned(9), COLORS, [], 0),
    "orientation JPEG": (turned(6, "JPEG"), [BLUE, RED, BLACK, GREEN], [TURNED], 3),
    "orientation WebP": (turned(6, "WEBP"), [BLUE, RED, BLACK, GREEN], [TURNED], 0),
    "damaged EXIF": (made("RGB", COLORS, "PNG", exif=b"Exif\0\0II*\0\xff"), COLORS, [], 0),
    "animated GIF": (animated("GIF"), COLORS, [FIRST_FRAME], 0),
    "animated PNG": (animated("PNG"), COLORS, [FIRST_FRAME], 0),
    "animated WebP": (animated("WEBP"), COLORS, [FIRST_FRAME], 0),
    "JPEG of two pictures": (animated("MPO"), COLORS, [], 3),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CASES)
def test_images_of_every_kind_look_as_in_a_viewer(name: str) -> None:
    data, expected, remarks, tolerance = CASES[name]
    decoded = read_square(data, 16, ImageRules())
    found = decoded.pixels.reshape(2, 8, 2, 8, 3).swapaxes(1, 2).reshape(4, 64, 3).astype(int)
    np.testing.assert_allclose(found, np.array(expected)[:, None] + 0 * found, atol=tolerance)
    assert list(decoded.remarks) == remarks


def read(data: bytes, rules: ImageRules) -> tuple[list[list[int]], tuple[str, ...]]:
    decoded = read_square(data, 16, rules)
    return decoded.pixels[::15, ::15].reshape(4, 3).tolist(), decoded.remarks


def test_each_rule_has_a_field_that_changes_it() -> None:
    on_blue = ImageRules(background="#0000ff")
    shown = [list(RED), list(BLUE), [128, 0, 127], list(BLUE)]
    assert read(CASES["RGBA"][0], on_blue) == (shown, (PLACED.format("#0000ff"),))
    stored = [list(color) for color in COLORS]
    assert read(turned(6), OFF) == (stored, ())
    assert read(CASES["profile"][0], OFF) == (stored, ())


@pytest.mark.parametrize("color", ["", "clear", "#00ff0000", "#12345", "url(x)", "rgba(1,2,3,4)"])
def test_the_background_is_an_opaque_colour(color: str) -> None:
    with pytest.raises(UserError, match=r"background is .*colour of CSS"):
        parse_value(ImageRules, {"background": color}, "x")


def test_a_turned_image_is_cropped_as_people_see_it() -> None:
    image = Image.fromarray(np.arange(5 * 2 * 3, dtype=np.uint8).reshape(2, 5, 3))
    exif = Image.Exif()
    exif[0x0112] = 3
    decoded = read_square(file_of(image, "PNG", exif=exif), 2, ImageRules())
    np.testing.assert_array_equal(decoded.pixels, np.asarray(image)[::-1, ::-1][:, 1:3])
    exif[0x0112] = 6
    decoded = read_square(file_of(image, "PNG", exif=exif), 2, ImageRules())
    assert (decoded.width, decoded.height) == (2, 5)


def test_a_transparent_colour_of_16_bits_is_refused_because_its_pixels_are_cut() -> None:
    data = png(2, 16, DEEP_COLORS, tRNS=bytes(6))
    with pytest.raises(UserError, match="16-bit RGB with a transparent colour; convert it"):
        read_square(data, 16, ImageRules())


def test_every_damage_to_a_profile_is_ignored_or_converted() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = np.frombuffer(SWAPPED, np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 4)] = generator.integers(0, 256, 4)
        data = made("RGB", COLORS, "PNG", icc_profile=damaged.tobytes())
        assert set(read_square(data, 16, ImageRules()).remarks) <= {IGNORED, CONVERTED}
