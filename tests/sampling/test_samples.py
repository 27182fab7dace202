"""Images are written at their positions, while the next batch is generated."""

from pathlib import Path

import numpy as np
import pytest

from ifvit import storage
from ifvit.images import Pixels
from ifvit.sampling.samples import missing_images, open_writer, read_images

IMAGES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


def test_images_come_back_at_their_positions(tmp_path: Path) -> None:
    with open_writer(str(tmp_path), [4, 0, 7, 2, 1]) as write:
        write(IMAGES[:2])
        write(IMAGES[2:])
    urls = [str(tmp_path / f"0000{position}.png") for position in (4, 0, 7, 2, 1)]
    assert (read_images(urls) == IMAGES).all()
    assert missing_images(str(tmp_path), range(9)) == [3, 5, 6, 8]


def test_a_failed_write_stops_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[Pixels] = []

    def generate() -> None:
        with open_writer("nowhere", range(5)) as write:
            for image in IMAGES:
                generated.append(image)
                write(image[None])

    def fail(url: str, data: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        generate()
    assert len(generated) == 2
