"""Source `webdataset`: tars of images with captions as img2dataset writes them, local or `s3://`."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.config import EncodeConfig
from data_pipeline.sources.base import (
    MAX_CAPTION,
    CaptionedImage,
    Captions,
    Source,
    Unit,
    caption_fields,
    captions_of,
    find_files,
    is_readme,
    shard_name,
)
from ifvit import connections, storage
from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.images import IMAGE_SUFFIXES
from ifvit.records import NonNegativeInt, parse_json, record, replace_lone_surrogates, shorten

Members = dict[str, tarfile.TarInfo]
"""Members of one key, by suffix in small letters."""

MAX_JSON_BYTES = 1 << 24
MAX_HEADER_BYTES = 1 << 20
MAX_TEXT_BYTES = 4 * MAX_CAPTION + 8  # a character has at most 4 bytes
SUFFIXES = tuple(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
_DOTTED = tuple(f".{suffix}" for suffix in SUFFIXES)


@record
class TarStatistics:
    """NNNNN_stats.json of img2dataset."""

    successes: NonNegativeInt | None = None


class WebDatasetTars(Source):
    """Captioned images in tars. Every tar becomes one shard; `samples_per_shard` has no effect.

    `images` is a folder or prefix, a pattern `FOLDER/*.tar`, or `FOLDER/{00000..00331}.tar`.
    A sample is `KEY.jpg` (or another of IMAGE_SUFFIXES) with its caption in `KEY.txt`, or under
    "caption" in `KEY.json`; `caption_key` names other suffixes or keys, which are all read. Raises
    UserError when a tar is missing.
    """

    classes = ()

    def __init__(self, config: EncodeConfig) -> None:
        self._config, self._sizes = config, find_files(config.images, ".tar")
        for url, num_bytes in self._sizes.items():
            if num_bytes is None:
                raise UserError(f"{url}: not a regular file; expected a tar")

    @property
    def sha256(self) -> str:
        """Hash of the names of the tars."""
        digest = hashlib.sha256(self._config.tar_keys.removeprefix("first_dot").encode())
        digest.update("".join(f"{name}," for name in self._config.caption_names).encode())
        for url in self._sizes:
            digest.update(json.dumps(url.rpartition("/")[2]).encode())
        return digest.hexdigest()

    def report(self) -> str:
        """Describe the numbers of tars and bytes."""
        gigabytes = sum(size or 0 for size in self._sizes.values()) / 1e9
        return f"{self._config.images}: {len(self._sizes):,} tars, {gigabytes:,.2f} GB"

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Return one unit per tar, sorted by name; opening a unit downloads a remote tar."""
        return [
            Unit(
                name=shard_name(number),
                open=partial(open_tar, url, self._config),
                is_listed=False,
                files=(url,),
                count_images=partial(_read_count, url),
            )
            for number, url in enumerate(self._sizes)
        ]


def _read_count(url: str) -> int | None:
    """Number of images in a tar by its NNNNN_stats.json, None without a readable one."""
    statistics = url.removesuffix(".tar") + "_stats.json"
    try:
        data = storage.read_bytes(statistics)
        return parse_json(TarStatistics, data, statistics, ignore_unknown=True).successes
    except StoreError:
        raise
    except UserError:
        return None


class _TarFile(io.BufferedReader):
    """An open tar; tarfile cannot read a header of more than MAX_HEADER_BYTES from it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes."""
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def open_tar(url: str, config: EncodeConfig) -> list[CaptionedImage]:
    """List the images of a tar in order. Raises UserError if the tar is cut off or malformed."""
    file = _open_local(url)
    samples: dict[str, Members] = {}
    twice: dict[str, str] = {}
    for member in _list_members(file, url):
        folder, slash, name = member.name.rpartition("/")
        if name.startswith(".") or "__MACOSX" in folder.split("/"):
            continue  # files of macOS beside the images
        stem, _, suffix = name.partition(".")
        if config.tar_keys == "last_dot" and "." in name:
            stem, _, suffix = name.rpartition(".")
        key = folder + slash + stem
        members = samples.setdefault(key, {})
        if suffix.lower() in members:
            twice[key] = f"the tar contains {member.name} twice"
        members[suffix.lower()] = member
    return [
        _build_image(key, members, twice.get(key, ""), file, url, config)
        for key, members in samples.items()
        if not (is_readme(key) and _choose_image(members) == (None, []))
    ]


def _list_members(file: _TarFile, url: str) -> list[tarfile.TarInfo]:
    """All members except folders."""
    if file.peek(2)[:2] == b"\x1f\x8b":
        raise UserError(f"{url}: a compressed tar; decompress it with gunzip")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = []
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                if not member.isdir():
                    members.append(member)
            # tarfile accepts a tar that is cut off between two members. A complete tar ends with
            # a block of zeros.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset)
            if end != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
            follows = os.pread(file.fileno(), MAX_HEADER_BYTES, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        reason = shorten(error)
        raise UserError(f"{url}: not a complete tar ({reason}); download it again") from None
    if follows.strip(b"\0"):
        raise UserError(f"{url}: another tar follows its end; unpack both and pack them as one")
    return members


def _open_local(url: str) -> _TarFile:
    """Open the tar or, if it is remote, a copy whose disk space is freed when it is closed."""
    if not connections.is_remote(url):
        return _TarFile(storage.open_file(url).detach())
    with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
        copy = Path(folder, "input.tar")
        storage.download(url, copy)
        return _TarFile(io.FileIO(copy))


def _build_image(
    key: str, members: Members, problem: str, file: _TarFile, url: str, config: EncodeConfig
) -> CaptionedImage:
    captions: Captions = []
    suffix, others = _choose_image(members)
    try:
        if problem:
            raise UserError(problem)
        if suffix is None:
            raise UserError(_describe_missing(others))
        captions = _read_captions(members, file, config.caption_names)
    except UserError as error:
        problem = str(error)
    return CaptionedImage(
        key=key,
        image_id=key,
        name=f"{Path(url).name}/{key}",
        read=partial(_read_member, file, members.get(suffix or ""), config.max_image_bytes),
        problem=problem,
        num_images=1 if suffix else max(1, len(others)),
        remarks=("images beside that of the same key were left out",) if others else (),
        **caption_fields(captions, config),
    )


def _choose_image(members: Members) -> tuple[str | None, list[str]]:
    """Suffix of the image, None if there is none or no single one, and the names of the others."""
    images = [suffix for suffix in SUFFIXES if suffix in members]
    others = [m.name for s, m in members.items() if s not in images and s.endswith(_DOTTED)]
    if len(images) > 1:
        return None, [members[suffix].name for suffix in images] + others
    return (images[0] if images else None), others


def _describe_missing(images: list[str]) -> str:
    if not images:
        return "the tar contains no image (jpg, png, webp) for this key"
    text = f"{len(images)} images have this key, as {images[0]}; keys end at the first dot, "
    return shorten(text + "--tar_keys last_dot changes this", 200)


def _read_captions(members: Members, file: _TarFile, names: tuple[str, ...]) -> Captions:
    """Captions under all `names`; without names KEY.txt, or else "caption" in KEY.json."""
    if not names:
        names = ("txt",) if "txt" in members else ("caption",)
    found: list[object] = []
    metadata: dict[str, Any] = {}
    if "json" in members and not all(name.lower() in members for name in names):
        data = _read_member(file, members["json"], MAX_JSON_BYTES)
        data = replace_lone_surrogates(data)
        metadata = parse_json(dict[str, Any], data, "malformed json of the key")
    for name in names:
        member = members.get(name.lower())
        found.append(_read_text(member, file) if member else metadata.get(name))
    if not any(name.lower() in members or name in metadata for name in names):
        searched = ", ".join(names) if names != ("caption",) else "txt, or in json"
        raise UserError(f"the tar contains no caption ({shorten(searched)}) for this key")
    return captions_of(found, "json of the key")


def _read_text(member: tarfile.TarInfo, file: _TarFile) -> str:
    # A longer text is cut anyway; at its new end may be a part of a character.
    data = _read_member(file, member, MAX_TEXT_BYTES, cut=True)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < MAX_TEXT_BYTES - 4:
            raise UserError(f"the caption is not UTF-8 ({error.reason})") from None
        return data.decode("utf-8-sig", "ignore")


def _read_member(
    file: _TarFile, member: tarfile.TarInfo | None, max_bytes: int, *, cut: bool = False
) -> bytes:
    """Read a regular member of at most `max_bytes`, or with `cut` that many bytes of it."""
    assert member is not None
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no regular file"
        raise UserError(f"{member.name} is {kind} in the tar")
    if member.size > max_bytes and not cut:
        raise storage.TooLargeError(f"{member.name} is larger than {max_bytes:,} bytes")
    # pread takes the offset as an argument, so threads can share the open file.
    return os.pread(file.fileno(), min(member.size, max_bytes), member.offset_data)
