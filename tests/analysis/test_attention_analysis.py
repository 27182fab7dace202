"""`ifvit analyze attention`: weights and prompts => files, a figure and a table."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_backbone import SMALL_CLASSES, SMALL_UNET, small_shape
from made_shards import make_samples, write_shards
from PIL import Image

from ifvit.analysis.attention_analysis import Prompts, analyze_run, attention_figure, record_layers
from ifvit.analysis.attention_maps import read_attention
from ifvit.analysis.config import AttentionConfig
from ifvit.cli import main
from ifvit.diffusion.config import Precision, SolverName
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.models.config import BackboneConfig
from ifvit.models.text_encoders import load_text_encoder
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights, save_weights
from ifvit.sampling.config import SamplingConfig
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity, TextSettings
from ifvit.shards.reader import ShardReader

MADE_UP = TextEncoderIdentity(name="made-up", sha256="1" * 64)


EARLY, INTERMEDIATE = "3*concat", "image cross_attention image"


def save_run(
    folder: Path,
    fusion: str = EARLY,
    text_encoder: TextEncoderIdentity = MADE_UP,
    context_shape: tuple[int, int] = (5, 12),
) -> str:
    """Write a run with untrained weights at step 3 for latents of 8 x 8 in patches of 2."""
    length, width = context_shape
    shape = small_shape(
        width=16,
        context_length=length,
        context_width=width,
        fusion=fusion,
        num_text_blocks=int(fusion != "image"),
        init_std=0.3,
    )
    return save(folder, shape, text_encoder)


def save(folder: Path, shape: BackboneConfig, text_encoder: TextEncoderIdentity | None) -> str:
    info = WeightsInfo(
        step=3,
        ema_decay=0.9,
        scaling_factor=0.5,
        vae=EncoderIdentity(name="made-up", sha256="0" * 64),
        text_encoder=text_encoder,
        classes=tuple(map(str, range(shape.num_classes or 0))),
        recipe_sha256="0" * 64,
    )
    save_weights(str(folder / "weights/step_00000003/ema"), build_backbone(shape), info)
    return str(folder)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", make_samples(6), [6])
    return str(tmp_path / "shards")


def test_two_runs_are_set_side_by_side(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        save_run(tmp_path / "early", EARLY),
        save_run(tmp_path / "intermediate", INTERMEDIATE),
    ]
    output = tmp_path / "out"
    flags = ["--shards", shards, "--num_prompts", "4", "--sampling.num_steps", "2"]
    main(["analyze", "attention", *runs, *flags, "--output", str(output)])
    printed = capsys.readouterr().out

    early, intermediate = (
        read_attention(str(output / name / "step_00000003.json"))
        for name in ("early", "intermediate")
    )
    assert early.protocol == intermediate.protocol
    assert early.protocol.num_prompts == 4
    assert (intermediate.fusion, intermediate.num_text_blocks) == (INTERMEDIATE, 1)
    assert [bool(layer.text) for layer in early.layers] == [True] * 3
    assert [bool(layer.text) for layer in intermediate.layers] == [False, True, False]

    rows = list(csv.DictReader((output / "attention.csv").open()))
    assert [row["run"] for row in rows] == ["early"] * 3 + ["intermediate"] * 3
    for row, layer in zip(rows, (*early.layers, *intermediate.layers), strict=True):
        assert row["layer"] == layer.name
        assert layer.text_share is not None
        assert float(row["text_share"]) == layer.text_share.value
        assert float(row["text_share_error"]) == layer.text_share.standard_error
        rank = layer.text.effective_rank.value if layer.text else ""
        assert row["rank"] == str(rank)
    assert printed.endswith((output / "attention.csv").read_text())
    with Image.open(output / "attention.png") as figure:
        assert figure.width > 500
    (part,) = attention_figure({"intermediate": intermediate}).subfigs
    assert part.get_suptitle() == "intermediate: image cross_attention image, 1 text block, step 3"
    assert part.axes[0].get_title() == "0\nimage"


def test_without_an_output_files_go_to_each_run(shards: str, tmp_path: Path) -> None:
    runs = [save_run(tmp_path / name) for name in ("one", "two")]
    flags = ["--shards", shards, "--num_prompts", "2", "--sampling.num_steps", "2"]
    main(["analyze", "attention", *runs, *flags])
    for run in runs:
        names = sorted(path.name for path in Path(run, "analysis/attention").iterdir())
        stem = "step_00000003"
        assert names == ["attention.csv", "attention.png", f"{stem}.json", f"{stem}.npz"]


def test_an_analysis_is_repeated_only_if_weights_protocol_or_files_differ(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [save_run(tmp_path / "one", EARLY), save_run(tmp_path / "two", INTERMEDIATE)]
    sampling = SamplingConfig(num_steps=2)

    def count_existing(num_prompts: int) -> int:
        config = AttentionConfig(
            runs=runs, shards=shards, num_prompts=num_prompts, sampling=sampling, device="cpu"
        )
        for run in runs:
            analyze_run(config, run, f"{run}/analysis")
        return capsys.readouterr().out.count("step_00000003.json exists")

    assert count_existing(2) == 0
    # The files are those of an analysis that was killed between its two files.
    maps = Path(runs[1], "analysis/step_00000003.npz")
    complete = maps.read_bytes()
    maps.write_bytes(b"other maps")
    assert count_existing(2) == 1
    assert maps.read_bytes() == complete
    assert count_existing(3) == 0
    save_run(tmp_path / "one", INTERMEDIATE)
    assert count_existing(3) == 1


def test_prompts_come_from_a_text_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_text_encoder("scenes/clip")
    run = save_run(tmp_path / "run", EARLY, encoder.identity, encoder.context_shape)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one red circle\n\ntwo blue squares\nthree green triangles\n")
    flags = ["--prompts", str(prompts), "--sampling.num_steps", "2"]
    main(["analyze", "attention", run, *flags])
    summary = read_attention(f"{run}/analysis/attention/step_00000003.json")
    assert summary.protocol.num_prompts == 3
    main(["analyze", "attention", run, *flags, "--num_prompts", "2"])
    shorter = read_attention(f"{run}/analysis/attention/step_00000003.json")
    assert shorter.protocol.num_prompts == 2
    assert shorter.protocol.prompts_sha256 != summary.protocol.prompts_sha256
    with pytest.raises(SystemExit):
        main(["analyze", "attention", run, *flags, "--num_prompts", "4"])
    assert "prompts.txt: 3 prompts, but 4 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["shards", "prompts"])
def test_images_are_guided_by_the_null_context_of_the_weights(
    source: str, shards: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts").write_text("one red circle\ntwo blue squares\n")
    sampling = SamplingConfig(num_steps=2, guidance_scale=5.0)
    config = AttentionConfig(
        runs=["run"],
        num_prompts=2,
        sampling=sampling,
        device="cpu",
        **{source: f"{tmp_path}/{source}"},
    )
    if source == "shards":
        identity, shape, reader = MADE_UP, (5, 12), ShardReader(shards)
        contexts = torch.tensor(np.stack([reader.context(n, 0) for n in range(2)]))
    else:
        encoder = load_text_encoder("scenes/clip")
        identity, shape = encoder.identity, encoder.context_shape
        contexts = encoder.encode(["one red circle", "two blue squares"])
    run = save_run(tmp_path / "run", EARLY, identity, shape)
    own = analyze_run(config, run, f"{run}/analysis").layers
    backbone, info = load_weights(run)
    zeros = replace(info, null_context="zeros")
    save_weights(str(tmp_path / "zeros"), backbone, zeros)
    found = analyze_run(config, str(tmp_path / "zeros"), f"{tmp_path}/analysis").layers
    prompts = Prompts(texts=["one", "two"], contexts=contexts, null_context=torch.zeros(1, *shape))
    expected = record_layers(backbone, NoiseSchedule(), prompts, config)
    assert found == tuple(layer.numbers for layer in expected)
    assert all(one.image_share != other.image_share for one, other in zip(found, own, strict=True))


@pytest.mark.parametrize(
    ("solver", "precision"), [("dpm_solver_pp", "fp32"), ("heun", "bf16"), ("euler", "tf32")]
)
def test_attention_of_a_flow_is_that_of_its_own_sampling(
    solver: SolverName, precision: Precision, shards: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "epsilon", EARLY)
    backbone, info = load_weights(run)
    flow = str(tmp_path / "flow")
    save_weights(flow, backbone, replace(info, prediction="flow", shift=3.0))
    sampling = SamplingConfig(num_steps=3, solver=solver, precision=precision)
    config = AttentionConfig(
        runs=[flow], shards=shards, num_prompts=2, sampling=sampling, device="cpu"
    )
    found = analyze_run(config, flow, f"{flow}/analysis")
    assert found.protocol.sampling["solver"] == solver
    reader = ShardReader(shards)
    contexts = torch.tensor(np.stack([reader.context(n, 0) for n in range(2)]))
    null = torch.from_numpy(np.array(reader.null_context))[None]
    prompts = Prompts(texts=["one", "two"], contexts=contexts, null_context=null)
    expected = record_layers(backbone, NoiseSchedule("cpu", "flow", 3.0), prompts, config)
    assert found.layers == tuple(layer.numbers for layer in expected)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_prompts", "7"], "6 images, but num_prompts is 7"),
        (["--num_prompts", "4", "--trim", "2"], "trim 2 leaves nothing of 4 x 4 patches"),
        (["--num_prompts", "1"], "num_prompts is 1; it must be at least 2"),
        (["--prompts", "p.txt"], "give either prompts (a text file) or shards"),
        (["--sampling.method", "date"], "sampling.method date"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    flags: list[str], named: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["analyze", "attention", run, "--shards", shards, *flags])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert named in lines[0]


def test_runs_that_do_not_fit_the_prompts_are_refused(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = TextEncoderIdentity(name="other", sha256="2" * 64)
    longer = replace(MADE_UP, settings=TextSettings(max_length=78))
    runs = {
        save_run(tmp_path / "other", EARLY, other): "text encoder made-up has sha256 111111111111",
        save_run(tmp_path / "longer", EARLY, longer): "text.max_length",
        save_run(tmp_path / "adaln", "image 2*adaln"): "its image tokens attend to no text",
        save(tmp_path / "classes", SMALL_CLASSES, None): "the weights generate 2 classes",
        save(tmp_path / "unet", SMALL_UNET, None): "its image tokens attend to no text",
    }
    for run, named in runs.items():
        with pytest.raises(SystemExit):
            main(["analyze", "attention", run, "--shards", shards, "--num_prompts", "2"])
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
