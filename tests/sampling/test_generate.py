"""The verb `generate` with the shipped encoders and an untrained backbone."""

import dataclasses
import json
from pathlib import Path

import pytest
from untrained import save_untrained

from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.images import decode_png
from ifvit.sampling.config import DateConfig, GenerateConfig
from ifvit.sampling.generate import generate
from ifvit.shards import EncoderIdentity


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_untrained(tmp_path_factory.mktemp("weights"))


def test_flags_of_the_command_line_are_flat(weights: str, tmp_path: Path) -> None:
    flags = f"--weights {weights} --prompt x --guidance_scale 3 --seed 1 --num_steps 50".split()
    flags += ["--solver", "ddim", "--output", str(tmp_path)]
    config = read_config(GenerateConfig, flags, prog="ifvit generate")
    assert (config.guidance_scale, config.seed, config.solver) == (3.0, 1, "ddim")


def test_prompts_become_files_rows_and_a_grid(weights: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufefftwo red circles\r\n\r\na blue square\n")
    config = GenerateConfig(
        weights=weights,
        prompts=str(tmp_path / "prompts.txt"),
        output=str(tmp_path / "out"),
        num_images=2,
        num_steps=2,
        device="cpu",
    )
    files = generate(config)
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["two red circles", "a blue square"] * 2
    assert [str(tmp_path / "out" / row["file"]) for row in rows] == files
    assert rows[0]["num_steps"] == 2
    assert len(rows[0]["weights_sha256"]) == 64
    assert decode_png(Path(files[0]).read_bytes()).shape == (64, 64, 3)
    assert decode_png((tmp_path / "out/grid.png").read_bytes()).shape == (130, 130, 3)

    once = dataclasses.replace(config, num_images=1, output=str(tmp_path / "once"), batch_size=1)
    for first, again in zip(files, generate(once), strict=False):
        difference = decode_png(Path(first).read_bytes()).astype(int)
        difference -= decode_png(Path(again).read_bytes())
        assert abs(difference).max() <= 1  # a rounding in another batch


def build_config(weights: str, folder: Path, **changes: object) -> GenerateConfig:
    (folder / "prompts.txt").write_text("two red circles\na blue square\na green triangle\n")
    given = {
        "weights": weights,
        "prompts": str(folder / "prompts.txt"),
        "output": str(folder / "out"),
        "num_steps": 2,
        "device": "cpu",
    }
    return GenerateConfig(**{**given, **changes})


def test_images_of_other_prompts_are_not_mixed_in(weights: str, tmp_path: Path) -> None:
    config = build_config(weights, tmp_path)
    generate(config)
    (tmp_path / "prompts.txt").write_text("two red circles\na blue square\na green circle\n")
    with pytest.raises(UserError, match="holds samples of another prompts_sha256"):
        generate(config)


def test_images_that_are_there_are_not_drawn_again(weights: str, tmp_path: Path) -> None:
    urls = [Path(url) for url in generate(build_config(weights, tmp_path))]
    urls[0].write_bytes(urls[2].read_bytes())
    drawn = urls[1].read_bytes()
    urls[1].unlink()
    more = generate(build_config(weights, tmp_path, num_images=2))
    assert urls[0].read_bytes() == urls[2].read_bytes()
    difference = decode_png(urls[1].read_bytes()).astype(int) - decode_png(drawn)
    assert abs(difference).max() <= 1
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == len(more) == 6


def test_processes_draw_a_share_each_and_the_last_one_lists_them(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(weights, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = []
    for rank in ("1", "0"):
        assert not (tmp_path / "out/samples.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        generate(config)
        drawn.append(sorted(path.name for path in (tmp_path / "out").glob("0*.png")))
    assert drawn == [["00001.png"], ["00000.png", "00001.png", "00002.png"]]
    assert len((tmp_path / "out/samples.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"prompts": None, "prompt": "x"}, "prompts_sha256")],
)
def test_images_of_other_settings_are_not_mixed_in(
    weights: str, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    generate(build_config(weights, tmp_path))
    with pytest.raises(UserError, match=f"holds samples of another {named}"):
        generate(build_config(weights, tmp_path, **change))
    generate(build_config(weights, tmp_path, batch_size=1))


def test_settings_of_methods_that_do_not_act_tell_no_images_apart(
    weights: str, tmp_path: Path
) -> None:
    generate(build_config(weights, tmp_path))
    generate(build_config(weights, tmp_path, date=DateConfig(radius=9.0)))


def test_another_encoder_than_that_of_the_training_is_refused(tmp_path: Path) -> None:
    foreign = EncoderIdentity(name="scenes/vae", sha256="f" * 64)
    config = GenerateConfig(weights=save_untrained(tmp_path, vae=foreign), prompt="x", device="cpu")
    with pytest.raises(UserError, match="vae scenes/vae has sha256"):
        generate(config)


@pytest.mark.parametrize(
    "wrong", [{}, {"prompt": "x", "prompts": "y"}, {"prompt": "x", "num_images": 0}]
)
def test_a_config_without_one_clear_order_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"prompt|num_images"):
        GenerateConfig(weights="run", **wrong)


def test_an_empty_prompts_file_is_a_user_error(weights: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")
    config = GenerateConfig(weights=weights, prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match="no prompts"):
        generate(config)
