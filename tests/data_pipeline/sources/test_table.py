"""Source `table`: three formats give the same images, and each mistake gives one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.sources.table import CaptionTable
from ifvit.errors import UserError
from ifvit.shards.reader import ShardReader

ROWS = [
    {"path": "b/2.jpg", "caption": 'a "fox", red'},
    {"path": "1.jpg", "caption": "Käse"},
    {"path": "b/2.jpg", "caption": "two\nlines"},
]


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "b").mkdir()
    for name in ("1.jpg", "b/2.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return str(tmp_path)


def write(folder: str, suffix: str) -> str:
    path = Path(folder, f"table.{suffix}")
    if suffix == "csv":
        path.write_text(
            'caption,path\n"a ""fox"", red",b/2.jpg\nKäse,1.jpg\n"two\nlines",b/2.jpg\n',
            encoding="utf-8-sig",  # as spreadsheets export it
        )
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{**row, "width": 3} for row in ROWS]), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_of_one_path_are_its_captions(images: str, suffix: str) -> None:
    source = CaptionTable(images, write(images, suffix))
    first, second = source.images
    assert (first.name, first.captions) == ("1.jpg", ("Käse",))
    assert (second.name, second.captions) == ("b/2.jpg", ('a "fox", red', "two\nlines"))
    assert second.read() == b"b/2.jpg"
    assert "2 images, 3 captions" in source.report()
    assert source.sha256 == CaptionTable(images, write(images, "csv")).sha256


def test_a_table_is_encoded(config: EncodeConfig) -> None:
    table = Path(config.images).parent / "table.csv"
    names = sorted(path.name for path in Path(config.images).iterdir())
    table.write_text("path,caption\n" + "".join(f"{name},photo {name}\n" for name in names))
    encode(replace(config, source="table", captions=str(table)))
    reader = ShardReader(config.output)
    assert [reader.metadata(sample).image_id for sample in range(10)] == names
    assert reader.metadata(3).captions == (f"photo {names[3]}",)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("t.csv", "path,text\n1.jpg,x\n", "t.csv:2: no text in column 'caption'; .* path, text"),
        ("t.csv", "path,caption\n1.jpg\n", "t.csv:2: no text in column 'caption'"),
        ("t.csv", "path,caption\n1.jpg,a,b\n", "t.csv:2: more cells than columns"),
        ("t.csv", 'path,caption\n1.jpg,"a\n', "not CSV"),
        ("t.csv", "path,caption\n", "no rows"),
        ("t.csv", "path,caption\n,x\n", "no text in column 'path'"),
        ("t.csv", "path,caption\n/1.jpg,x\n", "path /1.jpg is absolute"),
        ("t.csv", "path,caption\nnone.jpg,x\n", "none.jpg: no such file; paths in .* start at"),
        ("t.jsonl", '{"path": "1.jpg", "caption": "x"}\n{', "t.jsonl:2: not JSON"),
        ("t.jsonl", "[1]", "t.jsonl:1: not a JSON object"),
        ("t.jsonl", '{"path": "1.jpg", "caption": 3}', "t.jsonl:1: no text in column 'caption'"),
        ("t.parquet", "PAR1", "t.parquet: not Parquet"),
        ("t.csv", b"path,caption\n1.jpg,K\xe4se\n", "t.csv: not UTF-8"),
        ("t.xlsx", "", r"t.xlsx; a table source needs a file of type \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_malformed_table_is_one_line(
    images: str, name: str, text: str | bytes, named: str
) -> None:
    Path(images, name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=named) as caught:
        CaptionTable(images, str(Path(images, name)))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(images, "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; pip install 'ifvit\[table\]'"):
        CaptionTable(images, table)
