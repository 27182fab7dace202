"""Source `webdataset`: tars of images and captions as img2dataset writes them."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from encoded_files import finish, image_files, record_shards
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.completion import Failure
from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.sources import open_source
from data_pipeline.units import open_unit, read_or_fail
from ifvit import storage
from ifvit.errors import UserError
from ifvit.images import DecodedImage
from ifvit.shards.reader import ShardReader

Members = dict[str, bytes]


def write_tar(path: Path, members: Members, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_sample(image: Path, number: int) -> Members:
    """One sample of img2dataset: image, caption, and metadata that contain the caption too."""
    metadata = {"caption": f"photo {number}", "url": "http://…", "key": str(number)}
    return {
        f"{number:09d}.jpg": image.read_bytes(),
        f"{number:09d}.txt": f"photo {number}".encode(),
        f"{number:09d}.json": json.dumps(metadata).encode(),
    }


@pytest.fixture
def samples(config: EncodeConfig) -> list[Members]:
    return [make_sample(path, number) for number, path in enumerate(image_files(config)[:7])]


@pytest.fixture
def tars(config: EncodeConfig, samples: list[Members]) -> EncodeConfig:
    """00000.tar with three samples and statistics, 00001.tar with four samples."""
    folder = Path(config.images).parent / "tars"
    for name, part in (("00000", samples[:3]), ("00001", samples[3:])):
        write_tar(folder / f"{name}.tar", {k: v for sample in part for k, v in sample.items()})
    (folder / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    return replace(config, source="webdataset", images=str(folder), captions=None)


def test_one_tar_becomes_one_shard_with_the_latents_of_its_images(
    tars: EncodeConfig, config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = finish(tars)
    assert "2 tars, 0.00 GB" in capsys.readouterr().out
    assert [entry.num_samples for entry in manifest.shards] == [3, 4]
    reader = ShardReader(tars.output)
    for number in range(7):
        assert reader.metadata(number).image_id == f"{number:09d}"
        assert reader.metadata(number).captions == (f"photo {number}",)
    coco = replace(config, output=config.output + "_coco", samples_per_shard=3)
    finish(coco)
    for number in range(3):
        expected = ShardReader(coco.output).moments(number)
        assert reader.moments(number).tobytes() == expected.tobytes()


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00001}.tar", "/0000?.tar"])
def test_tars_are_found_by_folder_and_by_pattern(tars: EncodeConfig, pattern: str) -> None:
    units = open_source(replace(tars, images=tars.images + pattern)).units(1)
    assert [unit.open()[0].name[:9] for unit in units] == ["00000.tar", "00001.tar"]
    assert [unit.count_images() for unit in units] == [3, None]


class CountingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Object store in memory that counts its requests."""

    protocol = "faulty"
    requests: ClassVar[Counter[str]] = Counter()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.requests["ls"] += 1
        return list(super().ls(path, detail, **kwargs))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self.requests["info"] += 1
        return dict(super().info(path, **kwargs))


def test_a_folder_of_a_store_is_listed_by_one_request(tars: EncodeConfig) -> None:
    fsspec.register_implementation("faulty", CountingFileSystem, clobber=True)
    for path in Path(tars.images).iterdir():
        storage.upload(path, f"faulty://tars/{path.name}")
    CountingFileSystem.requests.clear()
    source = open_source(replace(tars, images="faulty://tars/{00000..00001}.tar"))
    assert source.report().endswith("2 tars, 0.00 GB")
    assert len(source.units(1)) == 2
    assert CountingFileSystem.requests == {"ls": 1}


def test_suffixes_of_tars_may_be_in_capitals(tars: EncodeConfig) -> None:
    Path(tars.images, "00001.tar").rename(Path(tars.images, "00001.TAR"))
    assert len(open_source(tars).units(1)) == 2


def test_captions_come_from_json_when_there_is_no_text(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    members = {k: v for k, v in (samples[0] | samples[1]).items() if not k.endswith("txt")}
    write_tar(Path(tars.images, "00000.tar"), members)
    images = open_source(tars).units(1)[0].open()
    assert [image.captions for image in images] == [("photo 0",), ("photo 1",)]


def test_a_sample_without_image_or_caption_is_a_named_failure(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    path = Path(tars.images, "00000.tar")
    write_tar(path, {"a.txt": b"no image", **samples[0], "b.jpg": b"", "b.json": b"{}"})
    with pytest.raises(UserError, match=r"2 of 7 images .*00000.tar/a \(the tar contains no image"):
        encode(tars)
    manifest = finish(replace(tars, tolerate=2))
    assert manifest.num_samples == 5
    marker = json.loads(storage.read_bytes(f"{tars.output}/completed/shard-00000.json"))
    assert [failure["reason"] for failure in marker["failures"]] == [
        "the tar contains no image (jpg, png, webp) for this key",
        "the tar contains no caption (txt, or in json) for this key",
    ]
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)  # an error if a rerun read the tar again
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert finish(replace(tars, tolerate=2)) == manifest


def test_an_empty_tar_is_an_empty_shard(tars: EncodeConfig) -> None:
    write_tar(Path(tars.images, "00000.tar"), {})
    assert [entry.num_samples for entry in finish(tars).shards] == [0, 4]


@pytest.mark.parametrize(
    ("pattern", "captions", "named"),
    [
        ("nowhere", None, "nowhere: no such .tar file"),
        ("/{00000..00002}.tar", None, "00002.tar: no such .tar file"),
        ("/{00000.tar", None, "Unbalanced braces"),
        ("", "captions.json", r"captions\.json is set, but source webdataset has no use"),
    ],
)
def test_missing_tars_and_superfluous_captions_are_named(
    tars: EncodeConfig, pattern: str, captions: str | None, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        open_source(replace(tars, images=tars.images + pattern, captions=captions))


def add_special(path: Path, name: str, kind: bytes, size: int = 0) -> None:
    """Add a member that is no regular file."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, size, "/etc/passwd"
        tar.addfile(info, io.BytesIO(bytes(size)))


def huge_header() -> bytes:
    """A tar of one block whose long name claims 8 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)


def huge_pax_size() -> bytes:
    """A tar whose extended header gives a member a size of 30 digits."""
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"size": "9" * 30}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(10240)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x.jpg": b"", "x.json": b"{"}, "Invalid JSON"),
        ({"x.jpg": b"", "x.json": b"\xff\xfe"}, "Invalid JSON"),
        ({"x.jpg": b"", "x.json": b"[" * 100_000}, "recursion limit"),
        ({"x.jpg": b"", "x.json": b"[]"}, "object"),
        ({"x.jpg": b"", "x.json": b'{"caption": 3}'}, "no text and no list of texts"),
        ({"x.jpg": b"", "x.json": b'{"caption": null}'}, "blank; --allow_blank_captions"),
        ({"x.jpg": b"", "x.json": bytes((1 << 24) + 1)}, "larger than 16,777,216 bytes"),
        ({"x.jpg": b"", "x.txt": b"x\xe9"}, "not UTF-8"),
        ({"x.jpg": b"", "x.txt": b" \n"}, "blank; --allow_blank_captions"),
        ({"x.jpg": b"", "x.png": b"", "x.txt": b"x"}, "2 images have this key, as x.jpg"),
        (
            {"v1.5_1.jpg": b"", "v1.5_1.txt": b"x"},
            "as v1.5_1.jpg; .*--tar_keys last_dot",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_one_failure_with_a_reason(
    tars: EncodeConfig, members: Members, reason: str
) -> None:
    write_tar(Path(tars.images, "00000.tar"), members)
    images = open_unit(open_source(tars).units(1)[0], tars)
    failures = [read_or_fail(image, tars) for image in images]
    assert len(failures) == 1
    assert isinstance(failures[0], Failure)
    assert re.search(reason, failures[0].reason)


def test_links_sparse_files_and_other_members_are_failures_and_not_read(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    path = Path(tars.images, "00000.tar")
    write_tar(path, {f"{key}.txt": b"x" for key in "abcde"} | samples[0])
    add_special(path, "a.jpg", tarfile.SYMTYPE)
    add_special(path, "b.jpg", tarfile.LNKTYPE)
    add_special(path, "c.jpg", tarfile.CHRTYPE)
    add_special(path, "d.jpg", tarfile.FIFOTYPE)
    add_special(path, "e.jpg", tarfile.GNUTYPE_SPARSE)
    images = open_unit(open_source(tars).units(1)[0], tars)
    found = {image.key: read_or_fail(image, tars) for image in images}
    reasons = [found[key].reason for key in "abcde"]  # type: ignore[union-attr]
    assert reasons == [
        "a.jpg is a link in the tar",
        "b.jpg is a link in the tar",
        "c.jpg is no regular file in the tar",
        "d.jpg is no regular file in the tar",
        "e.jpg is no regular file in the tar",
    ]
    assert isinstance(found["000000000"], DecodedImage)


def test_a_huge_image_in_a_tar_is_refused_by_its_size_and_a_flag_admits_it(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    small = replace(
        tars, max_megapixels=1500e-6, tolerate=5
    )  # the images have 36 x 40 to 36 x 46 pixels
    manifest = finish(small)
    assert manifest.num_samples == 2
    marker = json.loads(storage.read_bytes(f"{tars.output}/completed/shard-00000.json"))
    assert all("--max_megapixels allows more" in each["reason"] for each in marker["failures"])
    assert finish(replace(small, max_megapixels=100.0)).num_samples == 7


def test_files_of_macos_are_no_images(tars: EncodeConfig, samples: list[Members]) -> None:
    hidden = {"._000000000.jpg": b"x", ".DS_Store": b"x", "__MACOSX/a/b.jpg": b"x"}
    write_tar(Path(tars.images, "00000.tar"), hidden | samples[0])
    images = open_source(tars).units(1)[0].open()
    assert [image.key for image in images] == ["000000000"]


def test_images_that_share_a_key_are_all_named_and_the_last_dot_separates_them(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    image = next(iter(samples[0].values()))
    members = {}
    for number in range(20):
        members |= {f"v1.5_{number}.jpg": image, f"v1.5_{number}.txt": b"x"}
    write_tar(Path(tars.images, "00000.tar"), members)
    (only,) = open_source(tars).units(1)[0].open()
    assert only.problem.startswith("20 images have this key, as v1.5_0.jpg; keys end at")
    manifest = finish(replace(tars, tar_keys="last_dot"))
    assert manifest.num_samples == 24
    keys = [ShardReader(tars.output).metadata(number).image_id for number in range(20)]
    assert keys == [f"v1.5_{number}" for number in range(20)]


def test_a_second_image_beside_that_of_the_key_is_counted(
    tars: EncodeConfig, samples: list[Members], capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(Path(tars.images, "00000.tar"), {**samples[0], "000000000.mask.png": b"x"})
    finish(tars)
    out = capsys.readouterr().out
    assert (
        "1 images: images beside that of the same key were left out; the first is 00000.ta" in out
    )


def test_captions_in_json_may_be_a_list(tars: EncodeConfig, samples: list[Members]) -> None:
    image = next(iter(samples[0].values()))
    captions = json.dumps({"caption": ["one", "two"], "nan": float("nan")}).encode()
    write_tar(Path(tars.images, "00000.tar"), {"x.jpg": image, "x.json": captions})
    assert open_source(tars).units(1)[0].open()[0].captions == ("one", "two")


def join_with_next(path: Path) -> None:
    path.write_bytes(path.read_bytes() + path.with_name("00001.tar").read_bytes())


def test_a_damaged_file_of_statistics_counts_as_none(tars: EncodeConfig) -> None:
    Path(tars.images, "00000_stats.json").write_text("[1]")
    units = open_source(tars).units(9)
    assert [len(unit.open()) for unit in units] == [3, 4]
    assert units[0].count_images() is None


def cut_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a complete tar"),
        (cut_between_members, "not a complete tar"),
        (join_with_next, "another tar follows its end"),
        (lambda path: path.write_bytes(b"<html>not found" * 100), "not a complete tar"),
        (lambda path: write_tar(path, {}, "w:gz"), "a compressed tar; decompress it with gunzip"),
        (lambda path: path.write_bytes(b""), "not a complete tar"),
        (lambda path: path.write_bytes(huge_header()), "a header of 8589934592 bytes"),
        (lambda path: path.write_bytes(huge_pax_size()), "not a complete tar"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
)
def test_a_malformed_tar_is_one_line(
    tars: EncodeConfig, damage: Callable[[Path], object], named: str
) -> None:
    damage(Path(tars.images, "00000.tar"))
    with pytest.raises(UserError, match=f"00000.*{named}") as caught:
        encode(tars)
    assert "\n" not in str(caught.value)


def test_a_tar_that_does_not_open_stops_no_other_and_is_encoded_once_it_is_mended(
    tars: EncodeConfig, samples: list[Members], monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = replace(tars, batch_size=1)
    broken = Path(tars.images, "00001.tar")
    data = broken.read_bytes()
    write_tar(Path(tars.images, "00002.tar"), samples[0])
    broken.write_bytes(data[: len(data) // 2])
    Path(tars.images, "00000.tar").write_bytes(b"")  # its statistics promise 3 images
    named = (
        r"4 of 5 images .*00000\.tar \(not a .*; all its 3 images are missing\), 00001\.tar \(not"
    )
    with pytest.raises(UserError, match=named):
        encode(tars)
    written = record_shards(monkeypatch)
    with pytest.raises(UserError, match=r"4 of 5 .*download it again; counts as one"):
        encode(replace(tars, tolerate=3))
    tolerant = replace(tars, tolerate=4)
    assert (finish(tolerant).num_samples, written) == (1, [])
    broken.write_bytes(data)
    assert [entry.num_samples for entry in finish(tolerant).shards] == [0, 4, 1]
    assert written == ["shard-00001"]


def test_the_shards_do_not_replace_their_input_tars(tars: EncodeConfig) -> None:
    path = Path(tars.images, "00000.tar").rename(Path(tars.images, "shard-00000.tar"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"shard-00000.tar: a shard would replace this input"):
        encode(replace(tars, output=f"{tars.images}/."))
    assert path.read_bytes() == before


def test_other_tars_are_another_job(tars: EncodeConfig) -> None:
    finish(tars)
    Path(tars.images, "00001.tar").rename(Path(tars.images, "00002.tar"))
    with pytest.raises(UserError, match="source_sha256"):
        encode(tars)


def test_captions_have_the_suffixes_or_keys_that_the_recipe_names(
    tars: EncodeConfig, samples: list[Members]
) -> None:
    (image,) = (data for name, data in samples[0].items() if name.endswith(".jpg"))
    members = {
        "a.jpg": image,
        "a.txt": b"an address",
        "a.cap": b"\xef\xbb\xbfa text",
        "a.json": b'{"alt": ["one", "two"], "caption": "unused"}',
        "b.jpg": image,
        "b.CAP": b"only text",
        "c.jpg": image,
        "c.txt": b"an address",
    }
    write_tar(Path(tars.images, "00000.tar"), members)
    recipe = replace(tars, caption_key=".cap, alt", tolerate=1)
    unit = open_source(recipe).units(10)[0]
    found = unit.open()
    assert [image.captions for image in found] == [("a text", "one", "two"), ("only text",), ()]
    assert found[2].problem == "the tar contains no caption (cap, alt) for this key"
    assert open_source(recipe).sha256 != open_source(tars).sha256
    for key in ("a,", "cap, .cap"):
        with pytest.raises(UserError, match=f"caption_key is {key}; it must be different names"):
            open_source(replace(tars, caption_key=key))
    with pytest.raises(UserError, match=r"caption_key: alt .*coco has no use for it"):
        open_source(replace(tars, source="coco", captions="x.json", caption_key="alt"))
