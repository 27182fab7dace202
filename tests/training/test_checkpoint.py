"""Which checkpoint a run resumes from, and which checkpoints are kept."""

import hashlib
import json
import math
import random
import socket
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import losses
from safetensors.torch import load_file

from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation.runs import read_run
from ifvit.models.weights import load_weights
from ifvit.records import is_sha256
from ifvit.storage import join, read_bytes, write_bytes, write_sealed
from ifvit.training.checkpoint import (
    commit,
    fetch,
    fetch_newest,
    open_tensors,
    read_checkpoint,
    step_url,
    write_part,
)
from ifvit.training.config import TrainConfig
from ifvit.training.lease import Lease
from ifvit.training.loop import LossSums, TrainState
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def newest_step(run: str, cache: Path) -> int:
    saved = fetch_newest(run, cache)
    assert saved is not None
    return saved.state.step


def test_damaged_checkpoints_are_skipped_but_a_run_with_no_other_is_not_started_anew(
    recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(max_steps=2, checkpoint_every=1)
    train(config)
    run = config.run
    newest = fetch_newest(run, tmp_path)
    assert newest is not None
    with open_tensors(newest, tmp_path) as read, pytest.raises(UserError, match=r"no ema0\.5\.a"):
        read("ema0.5.a")

    assert newest_step(run, tmp_path) == 2
    (path,) = Path(newest.url).glob("part-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert newest_step(run, tmp_path) == 1
    path.write_bytes(data[:-4])
    assert newest_step(run, tmp_path) == 1
    path.unlink()
    assert newest_step(run, tmp_path) == 1
    Path(newest.url, "manifest.json").write_text('{"parts": 3}')
    assert newest_step(run, tmp_path) == 1
    (path,) = Path(step_url(run, 1)).glob("part-*")
    path.unlink()
    with pytest.raises(UserError, match=r"step_00000002.* remove .*checkpoints to start anew"):
        fetch_newest(run, tmp_path)


HOSTILE: list[tuple[str, str]] = [
    ("name", "../../victim"),
    ("name", "/tmp/victim"),
    ("name", "part-00000-of-00001-a.safetensors/../x"),
    ("sha256", "/tmp/victim"),
    ("bytes", "-1"),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_no_name_in_a_manifest_leads_out_of_its_checkpoint(
    recipe: Recipe, tmp_path: Path, key: str, value: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    config = replace(recipe(max_steps=1), run=f"memory://{uuid.uuid4().hex}")
    train(config)
    manifest = join(step_url(config.run, 1), "manifest.json")
    stored = json.loads(read_bytes(manifest))
    stored["parts"][0][key] = int(value) if key == "bytes" else value
    write_sealed(manifest, {name: stored[name] for name in stored if name != "seal"})
    with pytest.raises(UserError, match=rf"manifest\.json: parts.*{key}"):
        train(replace(config, max_steps=2))
    assert victim.read_text() == "precious"


def change(manifest: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**manifest, **changes}


@pytest.mark.parametrize(
    "build",
    [
        lambda stored: change(stored, state=change(stored["state"], step=2)),
        lambda stored: change(stored, state=change(stored["state"], seconds=-1.0)),
        lambda stored: change(stored, state=change(stored["state"], seconds="low")),
        lambda stored: change(stored, state=change(stored["state"], step=10**30)),
        lambda stored: change(stored, state={}),
        lambda stored: change(stored, scalars={}),
        lambda stored: change(stored, scalars={"num_updates": 1, "value": 3}),
        lambda stored: change(stored, parts=stored["parts"] * 2),
        lambda stored: change(stored, parts=[]),
        lambda stored: change(stored, shards_sha256="0"),
        lambda stored: change(stored, backbone={"architecture": ["unet"]}),
        lambda stored: change(stored, backbone={}),
        lambda stored: {},
    ],
)
def test_a_manifest_that_contradicts_itself_or_its_folder_is_one_line(
    recipe: Recipe, build: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    config = recipe(max_steps=1)
    train(config)
    manifest = join(step_url(config.run, 1), "manifest.json")
    stored = json.loads(read_bytes(manifest))
    del stored["seal"]
    write_sealed(manifest, build(stored))
    with pytest.raises(UserError) as error:
        train(replace(config, max_steps=2))
    assert str(error.value).isprintable()
    assert config.run in str(error.value)


def test_flipped_bytes_of_a_manifest_are_found(recipe: Recipe) -> None:
    config = recipe(max_steps=1)
    train(config)
    path = Path(step_url(config.run, 1), "manifest.json")
    saved, data, chance = read_checkpoint(str(path.parent)), path.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(str(path.parent))
        except UserError:
            continue
        assert found == saved


@pytest.mark.parametrize("header", [b"", b"{}", b"[" * 9000, b"\xff", b'{"backbone.a": {}}'])
def test_a_part_whose_hash_fits_but_whose_header_is_broken_is_one_line(
    recipe: Recipe, header: bytes
) -> None:
    config = recipe(max_steps=1)
    train(config)
    saved = read_checkpoint(step_url(config.run, 1))
    (part,) = saved.parts
    data = len(header).to_bytes(8, "little") + header
    Path(saved.url, part.name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    commit(replace(saved, parts=(replace(part, bytes=len(data), sha256=digest),)))
    with pytest.raises(UserError, match="step_00000001"):
        train(replace(config, max_steps=2))


def test_tensors_of_another_shape_or_type_are_not_loaded(recipe: Recipe) -> None:
    config = recipe(max_steps=1)
    train(config)
    saved = read_checkpoint(step_url(config.run, 1))
    (part,) = saved.parts
    tensors = load_file(Path(saved.url, part.name))
    name = "backbone.final_layer.bias"
    for value in (torch.zeros(1), tensors[name].double()):
        changed = write_part(saved.url, part.name, {**tensors, name: value})
        commit(replace(saved, parts=(changed,)))
        with pytest.raises(UserError, match=name):
            train(replace(config, max_steps=2))
    commit(replace(saved, parts=(replace(changed, tensors=("backbone.absent",)),)))
    with pytest.raises(UserError, match="holds no"):
        train(replace(config, max_steps=2))


@pytest.mark.parametrize("place", ["lease", "checkpoints/step_00000001", "weights/step_00000001"])
def test_a_run_with_a_link_to_another_one_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, place: str
) -> None:
    config, victim = recipe(max_steps=1), tmp_path / "victim"
    train(replace(config, run=str(victim)))
    before = {path: path.stat().st_mtime_ns for path in victim.rglob("*")}
    Path(config.run, place).parent.mkdir(parents=True)
    Path(config.run, place).symlink_to(victim / place)
    with pytest.raises(UserError, match=f"{place}: a link that leads out of"):
        train(replace(config, max_steps=2, keep_exports=1, keep_checkpoints=1))
    assert {path: path.stat().st_mtime_ns for path in victim.rglob("*")} == before
    (tmp_path / "home").symlink_to(victim)  # a run that is itself a link is an honest one
    assert train(replace(config, run=str(tmp_path / "home"), max_steps=2)).step == 2


def test_only_files_that_training_writes_are_pruned(recipe: Recipe) -> None:
    config = recipe(max_steps=3, checkpoint_every=1, keep_checkpoints=1)
    mine = [
        "checkpoints/step_00000001/thesis.tex",
        "checkpoints/step_1/part-00000-of-00001-a.safetensors",
        "checkpoints/step_best/manifest.json",
        "checkpoints/step_00000000/notes",
        "checkpoints/step_99999999999999999999/x",
        "checkpoints/notes",
    ]
    for name in mine:
        write_bytes(join(config.run, name), b"precious")
    train(config)
    for path in (Path(config.run, name) for name in mine):
        assert path.read_text() == "precious" if path.suffix == ".tex" else path.exists()
    assert not Path(config.run, mine[0]).with_name("manifest.json").exists()
    assert read_checkpoint(step_url(config.run, 3)).state.step == 3


def step_losses(loss: float) -> list[float]:
    """The losses of a step whose eight samples are all in the first quarter of the timesteps."""
    return [loss, loss, 0.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0, loss / 4, 1.0]


def test_the_mean_of_losses_does_not_depend_on_how_often_they_are_observed() -> None:
    values = [1.0, 2.0, 0.5, 4.0]
    at_once = replace(TrainState(), step=4).observe(list(map(step_losses, values)), 3)
    state = TrainState()
    for loss in values:
        state = replace(state, step=state.step + 1).observe([step_losses(loss)], 3)
    assert state == at_once
    assert at_once.since_log.mean == values[3]  # the third step ended an interval
    assert at_once.since_log.mean_by_time[0] == values[3] / 8
    assert all(map(math.isnan, at_once.since_log.mean_by_time[1:]))
    assert at_once.since_log.mean_representation == values[3] / 4


def test_the_mean_loss_leaves_out_steps_that_are_not_finite_and_stays_finite() -> None:
    values = [1.0, math.nan, 3.0, 1e38]
    state = replace(TrainState(), step=4).observe(list(map(step_losses, values[:3])), 10)
    assert state.since_log.mean == 2.0
    assert math.isnan(LossSums().mean)
    assert math.isnan(LossSums().mean_representation)
    diverged = replace(TrainState(), step=4).observe(list(map(step_losses, values)), 10)
    assert 1e6 < diverged.since_log.mean < 1e12


def test_a_run_that_another_job_holds_is_left_alone(recipe: Recipe) -> None:
    config = recipe()
    held = pytest.raises(UserError, match=r"in use by process .* choose another run directory")
    with Lease.acquire(config.run, beat_seconds=0.2).held(), held:
        train(config)
    assert not Path(config.run, "config.yaml").exists()
    train(replace(config, max_steps=1))
    assert json.loads(read_bytes(join(config.run, "lease", "000002.beat")))["released"]


class Member(ProcessGroup):
    """Group of a process on `node` whose other members, on other nodes, find no fault."""

    def __init__(self, world: World, nodes: list[str]) -> None:
        self.world, self._nodes = world, nodes

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return self._nodes if isinstance(value, str) else [value] * self.world.size


def test_the_processes_of_a_node_divide_the_parts_of_a_remote_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe(max_steps=1), run=f"memory://{uuid.uuid4().hex}")
    train(config)
    url = step_url(config.run, 1)
    saved = read_checkpoint(url)
    (part,) = saved.parts
    data, names = (
        read_bytes(join(url, part.name)),
        [f"part-0000{n}-of-00003-a.safetensors" for n in range(3)],
    )
    for name in names:
        write_bytes(join(url, name), data)
    parts = tuple(
        replace(part, name=name, tensors=part.tensors if name == names[0] else ()) for name in names
    )
    commit(replace(saved, parts=parts))
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    nodes = ["there", "here", "there", "here"]
    for rank, own in ((1, names[::2]), (3, names[1:2])):
        cache = tmp_path / str(rank)
        fetch(url, cache, Member(World(rank=rank, size=4, local_rank=0), nodes))
        assert sorted(path.name for path in cache.iterdir()) == own


def test_a_run_in_a_store_leaves_nothing_on_the_node(
    recipe: Recipe, whole: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe(max_steps=3), run=f"memory://{uuid.uuid4().hex}")
    train(config)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    train(replace(config, max_steps=5))
    assert losses(config) == losses(whole)[:5]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.s3
def test_a_run_in_a_store_is_resumed_and_read_from_there(
    recipe: Recipe,
    whole: TrainConfig,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    far = replace(recipe(), run=s3_bucket)
    train(replace(far, max_steps=5))
    train(far)
    assert losses(far) == losses(whole)
    for _ in range(2):
        (here, _), (there, info) = load_weights(whole.run), load_weights(far.run)
        assert info.step == 8
        assert all(map(torch.equal, here.parameters(), there.parameters()))
    [cache] = tmp_path.glob("ifvit-cache-*")
    assert len([file for file in cache.iterdir() if is_sha256(file.name)]) == 1  # the weights
    run = read_run(far.run, "far")
    assert run.recipe is not None
    assert len(run.curve) == 8
