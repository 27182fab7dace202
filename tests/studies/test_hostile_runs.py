"""Run folders of strangers: reports show what is in the run, or say in one line what is wrong."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_counts import made_row
from made_runs import build_row, noise, write_run

from ifvit.errors import UserError
from ifvit.evaluation.object_count import CountedImage
from ifvit.evaluation.runs import read_run
from ifvit.images import encode_png
from ifvit.sampling.samples import read_samples, write_samples
from ifvit.storage import write_sealed
from ifvit.studies.arms import as_arms, select
from ifvit.studies.config import ReportConfig
from ifvit.studies.study_page import report

ROW = "evaluation/scenes/w2/step_00001200.json"
SAMPLES = "evaluation/scenes/w2/step_00001200/samples.jsonl"
COUNTS = "evaluation/object_count/w4/step_00002000.json"
BACKBONE = "weights/step_00001200/ema/config.json"
SEALED = ["metrics.jsonl", ROW, SAMPLES, COUNTS]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_run(folder, build_row(0.41))
    write_sealed(str(folder / COUNTS), made_row())
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run without the files whose plots take seconds."""
    folder = tmp_path / "bare"
    write_run(folder, build_row(0.41))
    (folder / "metrics.jsonl").unlink()
    return folder


def read(run: Path) -> object:
    """All that a page reads of a run before it draws."""
    selection = select(as_arms([read_run(str(run), "run")]))
    return selection, selection.evaluations(next(iter(selection.series), None))


def show(run: Path) -> str:
    report(ReportConfig(runs=[str(run)], output=str(run / "../report.html")))
    return (run / "../report.html").read_text()


def result_of(function: Callable[[], object]) -> object:
    """What the function returns, or the line of its UserError."""
    try:
        return function()
    except UserError as error:
        return str(error) if str(error).isprintable() else "more than one line"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, delete or insert bytes, or exchange a number."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 30))
    inserted = rng.choice(
        [b"\0", b"\xff", b"NaN", b"-1", b"1e999", b"9" * 5000, b"[" * 5000, b'"', b"null", b"{}"]
    )
    return rng.choice(
        [
            data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
            data[:start],
            data[:end] + data[start:],
            data[:start] + data[end:],
            data[:start] + inserted + data[start:],
            data[:start] + inserted + data[end:],
        ]
    )


@pytest.mark.parametrize("name", SEALED)
def test_a_changed_file_with_a_seal_gives_the_same_run_or_one_line(name: str, run: Path) -> None:
    before, data = read(run), (run / name).read_bytes()
    rng = random.Random(name)
    for _ in range(30):
        (run / name).write_bytes(mutate(data, rng))
        found = result_of(lambda: read(run))
        if isinstance(found, str):
            assert name in found
        else:
            assert found == before or name.endswith(".jsonl"), "whole lines may be gone"


@pytest.mark.parametrize("name", ["config.yaml", BACKBONE])
def test_a_changed_recipe_or_backbone_is_a_page_or_one_line(name: str, run: Path) -> None:
    data, rng = (run / name).read_bytes(), random.Random(name)
    for number in range(60):
        (run / name).write_bytes(mutate(data, rng))
        found = result_of(lambda: read(run))
        if isinstance(found, str):
            assert name in found
        elif number % 20 == 0:
            show(run)


NOT_RECIPES = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a tag": b"!!python/object/apply:os.system ['touch evil']",
    "a date": b"2024-01-01: 2024-01-01",
    "a huge number": b"seed: " + b"9" * 10_000,
    "deep": b"{a: " * 3000,
    "not UTF-8": b"\xff\xfe\xfa",
    "aliases": b"a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\nglobal_batch_size: *c",
    "a batch of text": b"global_batch_size: many",
    "a batch of none": b"global_batch_size: 0",
}


@pytest.mark.parametrize("content", NOT_RECIPES.values(), ids=NOT_RECIPES)
def test_a_file_that_is_no_recipe_is_one_line(content: bytes, run: Path) -> None:
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml") as raised:
        read(run)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", [*SEALED, "config.yaml", BACKBONE])
@pytest.mark.parametrize("kind", ["folder", "pipe", "empty"])
def test_what_is_not_a_file_is_one_line(name: str, kind: str, run: Path) -> None:
    (run / name).unlink()
    if kind == "empty":
        (run / name).write_bytes(b"")
    elif kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).mkdir()
    if kind == "empty" and name.endswith(".jsonl"):
        read(run)
        return
    with pytest.raises(UserError, match=name):
        read(run)


def leave(run: Path, place: str) -> Path:
    """Exchange a file or folder of the run for a link to a copy outside."""
    outside = run.parent / "private"
    shutil.move(run / place, outside)
    (run / place).symlink_to(outside)
    return outside


@pytest.mark.parametrize(
    "place",
    [
        "config.yaml",
        "samples/step_00001200.png",
        "samples",
        "evaluation",
        SAMPLES.replace("samples.jsonl", "00000.png"),
        SAMPLES.replace("samples.jsonl", "real_00000.png"),
        SAMPLES.replace("/samples.jsonl", ""),
    ],
)
def test_a_link_out_of_the_run_is_never_shown(place: str, bare: Path) -> None:
    leave(bare, place)
    with pytest.raises(UserError, match="does not lead inside"):
        show(bare)


NAMES: list[Callable[[Path], None]] = [
    lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(encode_png(noise(0)[0])[:60]),
]


@pytest.mark.parametrize("spoil", NAMES, ids=["EPS", "empty", "cut"])
def test_what_is_not_an_image_is_named(spoil: Callable[[Path], None], bare: Path) -> None:
    spoil(bare / "samples/step_00001200.png")
    with pytest.raises(UserError, match=r"step_00001200\.png: "):
        show(bare)


@pytest.mark.parametrize("name", ["step_.png", "step_x.png", "step_٣.png", f"step_{'9' * 200}.png"])
def test_files_with_other_names_are_left_out(name: str, run: Path) -> None:
    before = read(run)
    (run / "samples" / name).write_bytes(b"")
    assert read(run) == before


EVIL = "$x_{ $</title><img src=x onerror=alert(1)>\x1b[31m javascript:alert(1)"


def test_texts_of_files_are_shown_as_texts(run: Path, tmp_path: Path) -> None:
    folder = str(run / Path(SAMPLES).parent)
    rows = read_samples(folder)
    write_samples(folder, [replace(row, prompt=EVIL) for row in rows])
    (run / "config.yaml").write_text(f"run: {EVIL.replace(chr(27), '')!r}\n")
    images = [
        CountedImage(file="a.png", prompt=EVIL, object=EVIL, asked=1, counted=number)
        for number in (1, 2)
    ]
    row = replace(made_row(), images=tuple(images))
    write_sealed(str(run / COUNTS), row)
    evil = tmp_path / "$x_{ <b>$ run"
    shutil.move(run, evil)
    page = show(evil)
    assert "<img src=x" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "&lt;img src=x onerror" in page
