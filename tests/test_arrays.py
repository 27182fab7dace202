"""Files of arrays come back equal, and what numpy.load would believe is refused."""

import io
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from ifvit.arrays import npy_bytes, parse_npy, parse_npz
from ifvit.errors import UserError

ARRAYS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
    "scalar": np.array(3),
    "flags": np.array([True, False]),
    "texts": np.array(["a", "bc", "ü"]),
    "bytes": np.array([b"a", b"bc"]),
    "empty": np.zeros((0, 4), np.int64),
    "no keys": np.array([], dtype=np.bytes_),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_equal(name: str) -> None:
    array = ARRAYS[name]
    found = parse_npy(npy_bytes(array), "x.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_arrays_comes_back_equal(save: object) -> None:
    buffer = io.BytesIO()
    save(buffer, **ARRAYS)  # type: ignore[operator]
    found = parse_npz(buffer.getvalue(), "x.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def header(descr: str = "'<f4'", shape: str = "(4,)", data: bytes = bytes(16)) -> bytes:
    """Build a `.npy` file with any header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


HOSTILE = {
    "huge": header(shape="(1000000000000,)"),
    "huge and empty": header(shape=f"(0, {10**15}, {10**15})", data=b""),
    "many dimensions": header(shape="(" + "1, " * 70 + ")"),
    "endless number": header(shape=f"({'9' * 3000},)"),
    "negative": header(shape="(-4,)"),
    "objects": header(descr="'|O'", data=pickle.dumps([1, 2])),
    "code": header(shape="(__import__('os').system('true'),)"),
    "nested": header(shape="(" * 3000 + ")" * 3000),
    "records": header(descr="[('a', '<f4')]"),
    "no such type": header(descr="'<f3'"),
    "empty texts": header(descr="'<U0'", data=b""),
    "short": header()[:-1],
    "long": header() + b"\0",
    "version 3": b"\x93NUMPY\x03" + header()[7:],
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_array_is_one_line_without_memory(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match=r"^x\.npy: ") as raised:
        parse_npy(HOSTILE[name], "x.npy")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


def zipped(content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr("a.npy", content)
    return buffer.getvalue()


def test_a_small_file_cannot_fill_the_memory() -> None:
    bomb = zipped(npy_bytes(np.zeros(50_000_000, np.int8)))
    directory = bomb.rindex(b"PK\x01\x02")
    liar = bytearray(bomb)
    liar[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")  # the size it states
    start = time.perf_counter()
    for data in (bomb, bytes(liar)):
        tracemalloc.start()
        with pytest.raises(UserError, match=r"^x\.npz"):
            parse_npz(data, "x.npz", max_bytes=10_000_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()
    assert time.perf_counter() - start < 1.0
    assert len(parse_npz(bomb, "x.npz")["a"]) == 50_000_000


def test_damaged_zip_files_are_one_line_or_come_back_equal() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=ARRAYS["half"], b=ARRAYS["texts"])
    intact, random = buffer.getvalue(), np.random.default_rng(0)
    messages = []
    for _ in range(300):
        data = bytearray(intact)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            data[place] ^= 1 << int(random.integers(8))
        try:
            found = parse_npz(bytes(data[: random.integers(1, 2 * len(data))]), "x.npz")
        except UserError as error:
            messages.append(str(error))
            continue
        if found.keys() == {"a", "b"}:
            np.testing.assert_array_equal(found["a"], ARRAYS["half"])
            np.testing.assert_array_equal(found["b"], ARRAYS["texts"])
    assert all(text.startswith("x.npz") and text.isprintable() for text in messages)
    for data in (zipped(b"x" * 100, zipfile.ZIP_BZIP2), zipped(b"", zipfile.ZIP_LZMA), b"PK", b""):
        with pytest.raises(UserError, match=r"^x\.npz"):
            parse_npz(data, "x.npz")
