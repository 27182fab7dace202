"""Self-contained pages from the templates beside this file: no script, no request to anywhere."""

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from ifvit import storage

_MAX_WIDTH = 1100
_SMALL = 128


def render(template: str, **values: Any) -> bytes:
    """The page as UTF-8; text in `values` is escaped, ready-made SVG is marked by the template."""
    environment = Environment(loader=PackageLoader("ifvit", "analysis"), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template(template).render(**values).encode()


def inline(url: str) -> str:
    """An image file as a data URI; small ones as they are, large ones as WebP."""
    return inline_bytes(storage.read_bytes(url))


def inline_bytes(data: bytes) -> str:
    """The same for the content of a PNG file."""
    with Image.open(io.BytesIO(data)) as file:
        if file.width > _SMALL:
            picture = file.convert("RGB")
            picture.thumbnail((_MAX_WIDTH, 4 * _MAX_WIDTH), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=90)
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
