"""Help imports no torch; a mistake of the user is one line and exit code 2."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ifvit.cli import main
from ifvit.connections import StoreError
from ifvit.errors import EXIT_STORE, UserError
from ifvit.verbs import VERBS

RECIPE = Path(__file__).parent.parent / "configs" / "train" / "coco256_early.yaml"


HELP = """
import contextlib, io, sys
from ifvit.cli import main
from ifvit.verbs import VERBS
for verb in ("", *VERBS):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main([*verb.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, verb
    assert f"usage: ifvit {verb}" in printed.getvalue(), verb
    assert "--config" in printed.getvalue(), verb
    assert not {"torch", "starlette", "matplotlib", "scipy"} & set(sys.modules), verb
"""


def test_help_of_every_verb_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", HELP], check=True)


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb that must fail => the only line that it prints."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["draw"], "no verb `draw`"),
        (["shards"], "no verb `shards`"),
        (["train"], "arguments are required: run"),
        (["cost", "--jsn"], "unrecognized arguments: --jsn"),
        (["train", "--min_snr_gamma", "5"], "--min_snr_gamma=5; use --objective.min_snr_gamma"),
        (["cost", "--backbone", "tiny", "--backbone.fusion", "2*imag"], "cost: fusion: 2*imag is"),
        (["cost", "--backbone", "tiny", "--backbone.depth", "7"], "arguments: --backbone.depth=7"),
        (["cost", "--config", "{backbone: {fusion: x}, json: true}"], "required: backbone.lat"),
        (["encode", "--config", "none.yaml"], "none.yaml: no such file"),
        (["shards", "verify", "nowhere"], "nowhere/manifest.json: no such file"),
        (["generate", "--weights", "nowhere", "--prompt", "x"], "nowhere: no weights there"),
        (["generate", "--weights", "nowhere"], "give one of prompt"),
        (["export", "nowhere", "there"], "nowhere: no weights there"),
        (["export", "nowhere"], "arguments are required: output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in fails(argv, capsys)


def test_a_recipe_that_is_not_yaml_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: runs/x\n  shards: data\n")
    assert f"{recipe}: not YAML" in fails(["train", "--config", str(recipe)], capsys)


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "below")
    assert folder in fails(["scenes", "--folder", folder, "--num_images", "1"], capsys)


def test_an_interrupted_verb_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ifvit.models.cost.cost", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["cost"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to continue\n"


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in VERBS)


def test_print_config_shows_every_field_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(RECIPE), "--print_config"])
    assert end.value.code == 0
    assert "fusion: 13*concat" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["", "train", "submit study"])
def test_the_reader_of_the_output_may_leave(verb: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ifvit", *verb.split(), "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert ended.stderr == b""
    assert ended.returncode in (0, 141)  # argparse itself ignores the error


def test_text_of_a_stranger_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(config: object) -> None:
        sys.stdout.write("caption\x1b[2J\ttwo\nlines\r\u009b\n")
        logging.getLogger("ifvit").warning("name\x1b]0;x\a")
        raise UserError("name\x1b[31m\nsecond line")

    monkeypatch.setattr("ifvit.models.cost.cost", show)
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(SystemExit):
        main(["cost"])
    shown = capsys.readouterr()
    assert shown.out == "caption\\x1b[2J\ttwo\nlines\\r\\x9b\n"
    assert shown.err.splitlines() == [
        "WARNING: name\\x1b]0;x\\x07",
        "error: name\\x1b[31m\\nsecond line",
    ]


def test_a_failed_store_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise StoreError("s3://bucket: no route to the store")

    monkeypatch.setattr("ifvit.models.cost.cost", fail)
    with pytest.raises(SystemExit, match=str(EXIT_STORE)):
        main(["cost"])
