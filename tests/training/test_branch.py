"""Runs that branch from a checkpoint of another: paired with it, and one line for a mistake."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from run_files import FLOW, finish, losses, start

from ifvit.cli import main
from ifvit.config import dump_config
from ifvit.errors import UserError
from ifvit.evaluation.runs import read_run
from ifvit.models.weights import load_weights
from ifvit.records import parse_yaml
from ifvit.storage import join, list_names, remove
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def parent(whole: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The recipe of `whole`, with checkpoints of steps 2, 4, 6 and 8; tests do not change it."""
    torch.set_num_threads(1)
    run = str(tmp_path_factory.mktemp("parent") / "user@host")
    config = replace(whole, run=run, checkpoint_every=2, keep_every=2)
    train(config)
    return config


def branch_of(parent: TrainConfig, step: int | str, run: Path, **fields: object) -> TrainConfig:
    return replace(parent, run=str(run), branch=f"{parent.run}@{step}", **fields)  # type: ignore[arg-type]


def frozen(parent: TrainConfig, run: Path, **fields: object) -> TrainConfig:
    """A branch whose weights stay as they are, so that its losses depend on draws alone."""
    still = replace(parent.optim, learning_rate=0.0)
    return branch_of(parent, 4, run, **{"optim": still, **fields})


def test_a_branch_without_changes_is_the_continuation_of_its_parent(
    parent: TrainConfig, tmp_path: Path
) -> None:
    branch = branch_of(parent, 4, tmp_path / "branch")
    state = train(branch)
    assert (state.step, state.samples_seen) == (8, 64)
    assert losses(branch, first_step=5) == losses(parent)[4:]
    for kind in ("raw", "ema"):
        mine, theirs = (load_weights(run, prefer=kind)[0] for run in (branch.run, parent.run))  # type: ignore[arg-type]
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


def test_a_killed_branch_continues_and_needs_its_parent_no_more(
    recipe: Recipe, whole: TrainConfig, tmp_path: Path
) -> None:
    first = recipe("first", max_steps=4)
    train(first)
    branch = branch_of(first, "latest", tmp_path / "branch", max_steps=8)
    train(replace(branch, max_steps=6))
    assert list_names(join(first.run, "checkpoints")) == ["latest", "step_00000004"]
    stored = Path(branch.run, "config.yaml")
    assert parse_yaml(stored.read_bytes(), "")["branch"] == f"{first.run}@4"
    remove(first.run)
    assert train(branch).step == 8
    assert losses(branch, first_step=5) == losses(whole)[4:]
    assert parse_yaml(stored.read_bytes(), "")["branch"] == f"{first.run}@4"
    with pytest.raises(UserError, match=rf"started with branch: {first.run}@4, .* now says None"):
        train(replace(branch, branch=None))


def test_two_branches_of_a_parent_have_the_same_draws(
    parent: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clipped = frozen(parent, tmp_path / "clipped")
    clipped = replace(clipped, optim=replace(clipped.optim, max_grad_norm=0.1))
    plain = frozen(parent, tmp_path / "plain")
    for config in (clipped, plain):
        train(config)
    assert losses(clipped, first_step=5) == losses(plain, first_step=5)
    assert losses(plain, first_step=5)[0] == losses(parent)[4]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if " -> " in line] == [
        f"{clipped.run}: optim.learning_rate: 0.01 -> 0.0",
        f"{clipped.run}: optim.max_grad_norm: None -> 0.1",
        f"{plain.run}: optim.learning_rate: 0.01 -> 0.0",
    ]
    assert "other draws" not in "\n".join(lines)


def test_another_seed_must_be_the_only_change(
    parent: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = branch_of(parent, 4, tmp_path / "other", seed=7)
    train(other)
    message = capsys.readouterr().err
    assert f"{other.run}: seed: 1234 -> 7\n" in message
    assert "another seed gives later steps other draws than those of the parent" in message
    assert losses(other, first_step=5)[0] != losses(parent)[4]
    with pytest.raises(UserError, match="says 7 beside other values of caption_dropout; set seed"):
        train(branch_of(parent, 4, tmp_path / "both", seed=7, caption_dropout=0.5))


def test_another_batch_size_continues_the_order_of_samples(
    parent: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halved = branch_of(parent, 4, tmp_path / "halved", global_batch_size=4, micro_batch_size=4)
    assert train(halved).samples_seen == 4 * 8 + 4 * 4
    assert "another global_batch_size gives later steps other draws" in capsys.readouterr().err


def test_text_may_enter_elsewhere_where_the_parameters_are_the_same(
    parent: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asdict(parent.backbone)["fusion"] == "image 3*cross_attention image"
    early = replace(parent.backbone, fusion="5*cross_attention")  # type: ignore[call-arg]
    config = frozen(parent, tmp_path / "early", backbone=early)
    train(config)
    assert "fusion: image 3*cross_attention image -> 5*cross_attention" in capsys.readouterr().err
    trained, unchanged = load_weights(config.run)[0], frozen(parent, tmp_path / "unchanged")
    assert trained.config == early
    train(unchanged)
    before = load_weights(unchanged.run)[0].state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in trained.state_dict().items())
    assert losses(config, first_step=5)[0] != losses(parent)[4]


def test_what_a_checkpoint_cannot_give_is_one_line(
    parent: TrainConfig, other_shards: str, tmp_path: Path
) -> None:
    wide = replace(parent.backbone, width=64, norm="rms_norm")  # type: ignore[call-arg]
    separate = replace(parent.backbone, fusion="5*separate_cross_attention")  # type: ignore[call-arg]
    for changed, message in (
        ({"backbone": wide}, r"backbone\.width: 32 \(recipe: 64\), backbone\.norm: .*; restore"),
        ({"backbone": separate}, r"backbone\.fusion: image 3\*cross_attention image \(recipe: 5"),
        ({"optim": OptimConfig(optimizer="muon")}, r"optim\.optimizer: adamw, .* says muon; rest"),
        ({"objective": FLOW}, r"trained to predict epsilon of vae 0.* the recipe says"),
        ({"scaling_factor": 0.2}, r"trained to predict epsilon of vae 0.* the recipe says"),
        ({"ema_decays": (0.5,)}, r"holds no ema0\.5\..*; use the ema_decays"),
        ({"shards": other_shards}, "trained on other shards"),
        ({"max_steps": 4}, "leaves nothing to train; set max_steps, which is 4, to more than 4"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train(branch_of(parent, 4, tmp_path / "branch", **changed))  # type: ignore[arg-type]
        assert str(error.value).isprintable()


def test_a_checkpoint_that_does_not_exist_is_one_line(
    parent: TrainConfig, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no checkpoint of step 5; take one of 2, 4, 6, 8, or set"):
        train(branch_of(parent, 5, tmp_path / "a"))
    for step in (4, "latest"):
        with pytest.raises(UserError, match=r"branch: .*nowhere holds no checkpoint; name a run"):
            train(branch_of(recipe("nowhere"), step, tmp_path / "b"))


@pytest.mark.parametrize("branch", ["runs/base", "@5", "runs/base@", "runs/base@-1", "runs/a@new"])
def test_a_branch_without_run_or_step_is_one_line(
    branch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", "a", "--shards", "b", "--backbone", "small", f"--branch={branch}"]
    with pytest.raises(SystemExit):
        main(["train", *words])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"branch is {branch}; it must be RUN@STEP, such as runs/base@5000" in message


def test_a_run_in_a_store_branches(recipe: Recipe, whole: TrainConfig) -> None:
    first = replace(recipe(max_steps=4), run=f"memory://{uuid.uuid4().hex}/first")
    train(first)
    second = replace(
        whole, run=first.run.replace("first", "second"), branch=f"{first.run}@00000004"
    )
    train(second)
    assert losses(second, first_step=5) == losses(whole)[4:]


def test_the_curve_of_a_branch_begins_where_it_left_its_parent(
    parent: TrainConfig, tmp_path: Path
) -> None:
    branch = branch_of(parent, 6, tmp_path / "branch")
    train(branch)
    assert [row.step for row in read_run(branch.run, "branch").curve] == [7, 8]
    page = tmp_path / "report.html"
    main(["report", parent.run, branch.run, "--output", str(page)])
    assert f"{parent.run}@6" in page.read_text()


@pytest.mark.distributed
def test_several_processes_branch_as_one_does(parent: TrainConfig, tmp_path: Path) -> None:
    engine = EngineConfig(backend="plain", zero_stage=0)
    branch = branch_of(parent, 4, tmp_path / "branch", micro_batch_size=4, engine=engine)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(branch))
    assert finish(start(main, (["train", "--config", str(recipe)],), 2)) == [0, 0]
    assert losses(branch, first_step=5) == pytest.approx(losses(parent)[4:], rel=1e-5)
