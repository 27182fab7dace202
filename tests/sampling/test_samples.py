"""Images are written at their positions, while the next batch is generated."""

from pathlib import Path

import numpy as np
import pytest

from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import Pixels, encode_png
from ifvit.records import dump_rows
from ifvit.sampling.samples import (
    SampleRow,
    claim_folder,
    image_url,
    missing_images,
    open_writer,
    read_images,
    read_samples,
    unfinished_images,
    write_samples,
)

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


def test_a_flipped_byte_changes_no_pixel_or_is_seen(tmp_path: Path) -> None:
    url, data = str(tmp_path / "00000.png"), encode_png(IMAGES[0])
    num_refused = 0
    for position in range(len(data)):
        broken = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        storage.write_bytes(url, broken)
        if unfinished_images(str(tmp_path), [0]):
            num_refused += 1
            with pytest.raises(UserError, match=r"00000\.png: .*delete it and generate it again"):
                read_images([url])
        else:
            np.testing.assert_array_equal(read_images([url])[0], IMAGES[0])
    # Of 77 bytes, those that say where the data and the file end matter to no pixel.
    assert num_refused == 56
    for broken in (b"", data[:-30], data[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        storage.write_bytes(url, broken)
        with pytest.raises(UserError, match=r"00000\.png: .*delete it"):
            read_images([url])


def test_images_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for url, image in zip(urls, (IMAGES[0], IMAGES[1][:2]), strict=True):
        storage.write_bytes(url, encode_png(image))
    with pytest.raises(UserError, match=r"b\.png: its size differs"):
        read_images(urls)


def test_a_list_of_samples_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    rows = [SampleRow(file="00000.png", prompt="a", position=0, scores={"count": True})]
    write_samples(str(tmp_path), rows)
    assert read_samples(str(tmp_path)) == rows
    for change in ({"file": "../x.png"}, {"real": "/etc/x.png"}, {"position": -1}, {"file": ""}):
        data = dump_rows([{"file": "00000.png", "prompt": "a", "position": 0, **change}])
        (tmp_path / "samples.jsonl").write_bytes(data)
        with pytest.raises(UserError, match=r"samples\.jsonl, line 1: "):
            read_samples(str(tmp_path))


def test_an_image_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00000.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(UserError, match="does not lead inside"):
        image_url(str(tmp_path / "samples"), 0)


def test_a_lost_row_is_seen(tmp_path: Path) -> None:
    rows = [SampleRow(file=f"{n}.png", prompt="a", position=n) for n in range(3)]
    write_samples(str(tmp_path), [rows[0], rows[2]])
    with pytest.raises(UserError, match=r"samples\.jsonl: damaged, rows are missing"):
        read_samples(str(tmp_path))


def test_settings_with_a_flipped_digit_are_refused(tmp_path: Path) -> None:
    claim_folder(str(tmp_path), {"seed": 17})
    claim_folder(str(tmp_path), {"seed": 17})
    with pytest.raises(UserError, match="samples of another seed"):
        claim_folder(str(tmp_path), {"seed": 18})
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace("17", "18"))
    with pytest.raises(UserError, match=r"settings\.json: damaged"):
        claim_folder(str(tmp_path), {"seed": 18})
