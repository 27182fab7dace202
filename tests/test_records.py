"""Records refuse what a stranger's file may hold, in one line, and give back what was written."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from ifvit.errors import UserError
from ifvit.records import (
    PlainName,
    PositiveFloat,
    PositiveInt,
    RelativePath,
    Rule,
    Sha256,
    decode_lines,
    dump_csv,
    dump_rows,
    dump_sealed,
    is_plain_name,
    is_relative_path,
    parse_json,
    parse_rows,
    parse_sealed,
    parse_value,
    parse_yaml,
    path_inside,
    printable,
    record,
    replace_lone_surrogates,
)


@record
class Part:
    name: PlainName
    sha256: Sha256


@record
class Description:
    count: PositiveInt = 3
    rate: PositiveFloat | None = None
    sizes: tuple[PositiveInt, ...] = ()
    parts: tuple[Part, ...] = ()
    kind: Literal["a", "b"] = "a"
    scores: dict[PlainName, float] | None = None
    path: RelativePath = "folder/file"


GOOD = Description(
    rate=0.1, sizes=(1, 2), parts=(Part(name="x.bin", sha256="0" * 64),), scores={"clip": 0.25}
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"count": 0}', "count is 0"),
        ('{"count": true}', "count"),
        ('{"count": 1.5}', "count"),
        ('{"count": "1"}', "count"),
        ('{"rate": NaN}', "rate"),
        ('{"rate": Infinity}', "rate"),
        ('{"rate": -1}', "rate"),
        ('{"sizes": [1, 0]}', r"sizes\[1\]"),
        ('{"sizes": 1}', "sizes"),
        ('{"kind": "c"}', "kind"),
        ('{"other": 1}', "other"),
        ('{"scores": {"../x": 1}}', "scores"),
        ('{"scores": {"x": NaN}}', "scores"),
        ('{"path": "a/../../b"}', "path"),
        ('{"parts": [{"name": "../x", "sha256": ""}]}', "parts.0.*name"),
        ('{"parts": [{"name": "x", "sha256": "/etc/passwd"}]}', "parts.0.*sha256"),
        ('{"parts": [{"name": "x"}]}', "parts.0.sha256"),
        ("[]", "file.json"),
        ("[" * 100_000, "file.json"),
        ('{"count": ' + "9" * 100_000 + "}", "file.json"),
        ('{"count": ' + "9" * 100 + "}", "count"),
        ('{"kind": "\\ud800"}', "file.json"),
        ("", "file.json"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_file_and_the_key(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        parse_json(Description, text, "file.json")
    message = str(raised.value)
    assert message.startswith("file.json")
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, 0.0, 1e300])
def test_a_record_that_is_built_in_python_is_checked_too(rate: float) -> None:
    with pytest.raises(UserError, match="rate"):
        Description(rate=rate)


def test_a_check_of_the_class_itself_runs_after_the_fields_are_checked() -> None:
    @record
    class Pair:
        low: PositiveInt
        high: PositiveInt

        def __post_init__(self) -> None:
            if self.high % self.low:
                raise UserError("high must be a multiple of low")

    with pytest.raises(UserError, match="low is 0"):
        Pair(low=0, high=3)
    with pytest.raises(UserError, match="multiple"):
        Pair(low=2, high=3)


def test_a_check_of_a_base_class_runs_for_a_derived_class_without_its_own() -> None:
    @record
    class Base:
        count: int

        def __post_init__(self) -> None:
            if self.count % 2:
                raise UserError("count must be even")

    @record
    class Derived(Base):
        size: PositiveInt = 1

    assert Derived(count=2).size == 1
    with pytest.raises(UserError, match="even"):
        Derived(count=1)
    with pytest.raises(UserError, match="size is 0"):
        Derived(count=2, size=0)


def test_checks_of_all_base_classes_run() -> None:
    @record
    class Even:
        count: int = 2

        def __post_init__(self) -> None:
            if self.count % 2:
                raise UserError("count must be even")

    @record
    class Other:
        size: PositiveInt = 1

    @record
    class Both(Other, Even):
        pass

    with pytest.raises(UserError, match="even"):
        Both(count=1)
    with pytest.raises(UserError, match="size is 0"):
        Both(size=0)


NAMES = {"a.png": True, "a b": True, "ü.jpg": True, ".hidden": True, "12:30\u202fPM": True}
NAMES |= dict.fromkeys(
    ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n", "\x1b[31m", "a::b"], False
)
NAMES |= {"a" * 256: False, " ": False, ".. ": False}


@pytest.mark.parametrize(("name", "is_plain"), NAMES.items())
def test_a_plain_name_stays_in_its_folder(name: str, is_plain: bool) -> None:
    assert is_plain_name(name) is is_plain
    assert is_relative_path(f"folder/{name}") is (is_plain or name == "a/b")


def test_no_link_and_no_name_leads_out_of_a_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "near").symlink_to(inside / "file")
    (inside / "loop").symlink_to(inside / "loop")
    assert path_inside(inside, "file") == inside / "file"
    assert path_inside(inside, "near") == inside / "near"
    assert path_inside(inside, "loop") == inside / "loop"  # cannot be opened
    for name in ("../out", "link/x", "link", "/etc/passwd", ""):
        with pytest.raises(UserError, match="does not lead inside"):
            path_inside(inside, name)


def test_a_sealed_record_comes_back_equal() -> None:
    assert parse_sealed(Description, dump_sealed(GOOD), "file") == GOOD
    rows = [GOOD, Description()]
    assert parse_rows(Description, dump_rows(rows), "rows") == rows


def test_every_flipped_digit_of_a_sealed_record_is_found() -> None:
    data = dump_sealed({"loss": 0.125, "step": 500, "name": "a"})
    original: dict[str, Any] = json.loads(data)
    for position in range(len(data)):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        try:
            found = parse_sealed(dict[str, Any], flipped, "file")
        except UserError:
            continue
        assert {**found, "seal": original["seal"]} == original


def test_a_damaged_row_is_named_by_its_line_and_an_unfinished_last_line_is_left_out() -> None:
    data = dump_rows([{"step": 1}, {"step": 2}])
    assert parse_rows(dict[str, int], data + b'{"step": 3', "rows") == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError, match="rows, line 2"):
        parse_rows(dict[str, int], data.replace(b'"step": 2', b'"step": 3'), "rows")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *("a: [", "!!python/object/apply:os.system [ls]", "[" * 20_000, "2001-99-99", BOMB),
        *("&a [*a]", "a: &a {b: 1}\nc: {<<: *a}", "9" * 5000, "x" * 2_000_000, b"\xff\xfe\x00"),
    ],
)
def test_a_hostile_yaml_document_is_refused(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"^file\.yaml"):
        parse_yaml(text, "file.yaml")


def test_yaml_values_are_checked_as_json_is() -> None:
    assert parse_value(Description, parse_yaml("{sizes: [4]}", "f"), "f").sizes == (4,)
    with pytest.raises(UserError, match=r"^f: "):
        parse_value(Description, parse_yaml("{kind: 2001-01-01}", "f"), "f")


def test_further_keys_of_a_foreign_file_are_ignored_on_request() -> None:
    foreign = {"count": 2, "parts": [{"name": "x", "sha256": "0" * 64, "size": 1}], "colour": "red"}
    assert parse_value(Description, foreign, "config.json", ignore_unknown=True).count == 2
    with pytest.raises(UserError, match=r"config\.json: count"):
        parse_value(Description, {**foreign, "count": 0}, "config.json", ignore_unknown=True)
    with pytest.raises(UserError, match=r"config\.json: parts.0.size"):
        parse_value(Description, foreign | {"colour": None}, "config.json")


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable("a\x1b[31mb\nü") == "a\\x1b[31mb\\nü"


def test_no_cell_of_a_csv_file_is_a_formula_and_numbers_stay_numbers() -> None:
    texts = ["=1+1", "+x", "-x", "@x", "\t=1", "\r=1", "a\r=1", "a=1", "-0.5", ""]
    data = dump_csv([{"text": text, "number": -1.5, "none": None} for text in texts])
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    escaped = ["'=1+1", "'+x", "'-x", "'@x", "'\t=1", "'\n=1", "a\n=1", "a=1", "-0.5", ""]
    assert [row["text"] for row in rows] == escaped
    assert {(row["number"], row["none"]) for row in rows} == {("-1.5", "")}


def test_rules_of_the_same_words_keep_their_own_conditions() -> None:
    @record
    class Pair:
        low: Annotated[int, Rule("small", lambda value: value < 10)]
        lower: Annotated[int, Rule("small", lambda value: value < 5)]

    with pytest.raises(UserError, match="lower is 7"):
        Pair(low=7, lower=7)


def test_a_byte_order_mark_of_windows_is_no_part_of_json() -> None:
    assert parse_json(Description, b'\xef\xbb\xbf{"count": 3}\r\n', "x").count == 3


def test_a_loop_of_links_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert path_inside(tmp_path, "loop") == tmp_path / "loop"


def test_lines_of_text_end_as_editors_end_them_and_nowhere_else() -> None:
    inside = "a\x0cb\x0bc\x85d\u2028e\u2029f\x1cg"
    data = f"\ufeff{inside}\r\n\r\nsecond\rthird\nlast".encode()
    assert decode_lines(data, "x.txt") == [inside, "", "second", "third", "last"]
    with pytest.raises(UserError, match=r"x\.txt: not UTF-8 at byte 1 .*convert"):
        decode_lines("K\xe4se".encode("latin-1"), "x.txt")


def test_halves_of_emojis_in_json_are_replaced_and_nothing_else_is() -> None:
    texts = [
        "\ud83d",
        "a \udc00\ud83d b",
        "\U0001f600",
        "\\ud83d",
        "\\\ud83d",
        "\ud83d\ud83d\ude00",
    ]
    data = replace_lone_surrogates(json.dumps(texts).encode())
    valid = ["\ufffd", "a \ufffd\ufffd b", *texts[2:4], "\\\ufffd", "\ufffd\U0001f600"]
    assert parse_json(list[str], data, "x.json") == valid
