"""Source `table`: three formats give the same images, and each mistake gives one clear line."""

import codecs
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.config import EncodeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import verify
from data_pipeline.sources.caption_files import CaptionTable
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


def open_table(images: str, table: str, caption_key: str | None = None) -> CaptionTable:
    return CaptionTable(
        EncodeConfig(images=images, captions=table, caption_key=caption_key, output="", vae="")
    )


def write(folder: str, suffix: str) -> str:
    path = Path(folder, f"table.{suffix}")
    if suffix == "tsv":
        path.write_text(
            'caption\tpath\n"a ""fox"", red"\tb/2.jpg\nKäse\t1.jpg\n"two\nlines"\tb/2.jpg'
        )
    elif suffix == "csv":
        path.write_text(
            'caption,path\n"a ""fox"", red",b/2.jpg\nKäse,1.jpg\n"two\nlines",b/2.jpg\n',
            encoding="utf-8-sig",  # as spreadsheets export it
        )
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{**row, "width": 3} for row in ROWS]), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_one_path_are_its_captions(images: str, suffix: str) -> None:
    source = open_table(images, write(images, suffix))
    first, second = source.images
    assert (first.name, first.captions) == ("1.jpg", ("Käse",))
    assert (second.name, second.captions) == ("b/2.jpg", ('a "fox", red', "two\nlines"))
    assert second.read() == b"b/2.jpg"
    assert "2 images, 3 captions" in source.report()
    assert source.sha256 == open_table(images, write(images, "csv")).sha256


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
        (
            "t.csv",
            "path,text\n1.jpg,x\n",
            "t.csv: no column 'caption'; .*--caption_key",
        ),
        ("t.csv", "path,caption\n1.jpg\n", "t.csv:2: fewer cells than columns"),
        ("t.csv", "path,caption\n1.jpg,a,b\n", "t.csv:2: more cells than columns"),
        ("t.csv", 'path,caption\n1.jpg,"a\n', "not CSV"),
        ("t.csv", "path,caption\n", "no rows"),
        ("t.csv", "path,caption,caption\n1.jpg,x,y\n", "two columns are called 'caption'"),
        ("t.tsv", 'path\tcaption\n1.jpg\t"x\n2.jpg\ty"\n', "t.tsv:3: a quote joins rows"),
        ("t.csv", "path,caption\n,x\n", "no text in column 'path'"),
        ("t.csv", "path,caption\n/1.jpg,x\n", "t.csv:2: path /1.jpg does not lead .*--images"),
        ("t.csv", "path,caption\n../1.jpg,x\n", "t.csv:2: path ../1.jpg does not lead inside"),
        ("t.csv", "path,caption\nb/../../1.jpg,x\n", "does not lead inside"),
        ("t.csv", "path,caption\nhttp://x/1.jpg,x\n", "is a URL; download the images first"),
        ("t.csv", "path,caption\n1\0.jpg,x\n", r"path 1\\x00.jpg does not lead inside"),
        ("t.jsonl", '{"path": ' * 100_000, "t.jsonl:1: "),
        ("t.jsonl", '{"path": "1.jpg", "caption": "x", "n": ' + "9" * 5000 + "}", "t.jsonl:1: "),
        ("t.csv", "path,caption\nnone.jpg,x\n", "none.jpg: no such file; paths in .* start at"),
        ("t.jsonl", '{"path": "1.jpg", "caption": "x"}\n{', "t.jsonl:2: Invalid JSON"),
        ("t.jsonl", "[1]", "t.jsonl:1: .*object"),
        (
            "t.jsonl",
            '{"path": "1.jpg", "caption": 3}',
            "t.jsonl:1: the caption is no text and no list",
        ),
        ("t.parquet", "PAR1", "t.parquet: not Parquet"),
        ("t.csv", b"path,caption\n1.jpg,K\xe4se\n", "t.csv: not UTF-8"),
        (
            "t.xlsx",
            "",
            r"t.xlsx; a table source needs a file of type \.csv, \.tsv, \.jsonl",
        ),
    ],
)
def test_a_malformed_table_is_one_line(
    images: str, name: str, text: str | bytes, named: str
) -> None:
    Path(images, name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=named) as caught:
        open_table(images, str(Path(images, name)))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(images, "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; pip install 'ifvit\[table\]'"):
        open_table(images, table)


def test_lines_end_where_the_format_says(images: str) -> None:
    caption = "one\u2028two\x85three\x0cfour"
    table = Path(images, "t.jsonl")
    rows = [json.dumps({"path": "1.jpg", "caption": caption}, ensure_ascii=False)] * 2
    table.write_bytes(codecs.BOM_UTF8 + "\r\n".join(rows).encode())
    assert open_table(images, str(table)).images[0].captions == (caption, caption)
    table = Path(images, "t.csv")
    table.write_bytes(f"path,caption\r\n1.jpg,{caption}\r\n".encode())
    assert open_table(images, str(table)).images[0].captions == (caption,)
    table.write_text(f"path,caption\n1.jpg,{'x' * 200_000}\n")
    assert len(open_table(images, str(table)).images[0].captions[0]) == 200_000  # is cut later


@pytest.mark.parametrize("path", ["./1.jpg", "{images}/1.jpg"])
def test_paths_may_be_absolute_or_written_oddly_inside_the_folder(images: str, path: str) -> None:
    table = Path(images, "t.csv")
    table.write_text(f"path,caption\n{path.format(images=images)},x\n")
    assert [image.name for image in open_table(images, str(table)).images] == ["1.jpg"]


def test_a_parquet_file_without_captions_names_its_columns(images: str) -> None:
    table = Path(images, "t.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"path": "1.jpg", "text": "x"}]), table)
    with pytest.raises(UserError, match=r"no column 'caption'; .*; the columns are path, text"):
        open_table(images, str(table))


def test_a_parquet_file_that_expands_without_bound_is_refused(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"path": "1.jpg", "caption": "x" * 10_000}
    table = Path(images, "t.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row] * 10_000), table)
    assert table.stat().st_size < 20_000
    monkeypatch.setattr("data_pipeline.sources.caption_files.MAX_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"more than 1,000,000 characters; divide the table"):
        open_table(images, str(table))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_captions_come_from_several_columns_and_lists(images: str, suffix: str) -> None:
    rows = [
        {"path": "1.jpg", "short": "a fox", "long": ["a red fox", "a fox\u2028runs"]},
        {"path": "b/2.jpg", "short": "", "long": []},
        {"path": "b/2.jpg", "short": None, "long": None},
    ]
    table = Path(images, f"t.{suffix}")
    if suffix == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    source = open_table(images, str(table), "long, short")
    assert source.images[0].captions == ("a red fox", "a fox\u2028runs", "a fox")
    assert source.images[0].sources == (0, 0, 1)
    assert (source.images[1].captions, source.images[1].sources) == (("", ""), (1, 0))
    with pytest.raises(UserError, match=r"no column 'caption'.* short, long"):
        open_table(images, str(table))


def test_rows_without_a_caption_cost_their_image_only(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in Path(config.images).iterdir())
    captions = [None, "", ["two", "texts"], *["one"] * 7]
    table = Path(config.images).parent / "table.jsonl"
    rows = [{"path": p, "text": c} for p, c in zip(names, captions, strict=True)]
    table.write_text("\n".join(map(json.dumps, rows)))
    recipe = replace(config, source="table", captions=str(table), caption_key="text", tolerate=2)
    encode(recipe)
    verify(ShardsConfig(url=config.output))
    out = capsys.readouterr().out
    assert "2 of 10 images could not be read" in out
    assert "all its captions are blank" in out
    assert "8 images, 9 captions: every hash" in out
