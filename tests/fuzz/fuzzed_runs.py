"""A small run with its evaluations and jobs, and how the program reads each of its files."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_backbone import small_shape
from made_counts import made_row
from made_shards import make_samples, write_shards
from mutations import Format, seal_again

from ifvit.analysis.attention_maps import (
    AttentionProtocol,
    AttentionSummary,
    LayerNumbers,
    PromptMean,
    TextSpectrum,
    layer_names,
    read_attention,
    write_attention,
)
from ifvit.analysis.knockout import FOLDER as KNOCKOUT_FOLDER
from ifvit.analysis.knockout import (
    KnockoutAnalysis,
    KnockoutProtocol,
    KnockoutRow,
    list_windows,
    read_knockout,
)
from ifvit.analysis.knockout_analysis import knockout_figure, table_rows
from ifvit.errors import UserError
from ifvit.evaluation.features import CLIP, FeatureNetwork
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.object_count import read_object_counts
from ifvit.evaluation.references import read_reference
from ifvit.evaluation.rows import FOLDER, MetricsRow, Protocol, row_url, samples_url
from ifvit.evaluation.runs import read_run
from ifvit.image_rules import ImageRules
from ifvit.images import decode_png, encode_png
from ifvit.models.weights import load_weights
from ifvit.records import dump_rows
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.samples import SampleRow, read_samples, write_samples
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import read_bytes, write_sealed
from ifvit.studies.arms import samples_folder
from ifvit.training.checkpoint import fetch_newest, open_tensors
from ifvit.training.config import (
    EngineConfig,
    OptimConfig,
    ReplayConfig,
    SampleGridConfig,
    TrainConfig,
    ValidationConfig,
)
from ifvit.training.guards import check_recipe
from ifvit.training.lease import Lease
from ifvit.training.replay import replay
from ifvit.training.train import train
from slurm.jobs import JobRecord, SubmissionRecord, read_records, write_record
from slurm.status import describe_progress
from slurm.supervise import Start, read_starts

CONTEXT = (3, 8)
MOMENTS = (8, 4, 4)
STEP = "step_00000002"


def recipe(run: Path, shards: Path) -> TrainConfig:
    return TrainConfig(
        run=str(run),
        shards=str(shards),
        backbone=small_shape(
            latent_size=4, width=8, num_heads=1, fusion="2*cross_attention", num_text_blocks=0,
            context_length=CONTEXT[0], context_width=CONTEXT[1],
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
        engine=EngineConfig(backend="plain"),
        sample_grid=SampleGridConfig(every=0),
        validation=ValidationConfig(shards=str(shards.parent / "held_out"), every=2, num_samples=2),
        max_steps=2,
        global_batch_size=2,
        micro_batch_size=2,
        ema_decays=(0.9,),
        log_every=1,
        checkpoint_every=2,
        num_workers=1,
        trackers=(),
    )  # fmt: skip


def make_run(folder: Path) -> list[Format]:
    run, shards = folder / "run", folder / "shards"
    samples = make_samples(4, moments_shape=MOMENTS, context_shape=CONTEXT)
    held_out = make_samples(2, moments_shape=MOMENTS, context_shape=CONTEXT, seed=1)
    for path, written in ((shards, samples), (folder / "held_out", held_out)):
        path.mkdir(parents=True)
        write_shards(path, written, (2,) * (len(written) // 2))
    train(recipe(run, shards))
    part = next((run / "checkpoints" / STEP).glob("part-*")).relative_to(folder).as_posix()
    lease = run / "lease" / "000001.json"
    if lease.exists():
        stored = json.loads(lease.read_text())
        lease.write_text(json.dumps({**stored, "beat_seconds": 0.01}))
        seal_again(lease)
    manifest = f"run/checkpoints/{STEP}/manifest.json"
    weights = f"run/weights/{STEP}/ema"
    info, tensors = f"{weights}/weights.json", f"{weights}/diffusion_pytorch_model.safetensors"
    checkpoint = (read_checkpoint,)
    failure = _write_failure(folder, shards)

    def of_run(
        name: str, file: str, *readers: Callable[[Path], object], hashed_in: tuple[str, ...] = ()
    ) -> Format:
        return Format(
            name=name, folder=folder, file=file, readers=readers, sealed=True, hashed_in=hashed_in
        )

    return [
        of_run("checkpoint manifest", manifest, *checkpoint),
        of_run("checkpoint part", part, *checkpoint, hashed_in=(manifest,)),
        of_run("weights.json", info, read_weights),
        of_run("weights config.json", f"{weights}/config.json", read_weights, read_curve,
               hashed_in=(info,)),
        of_run("weights tensors", tensors, read_weights, hashed_in=(info,)),
        replace(of_run("run config.yaml", "run/config.yaml", compare_recipe, read_curve),
                sealed=False),
        of_run("metrics.jsonl", "run/metrics.jsonl", read_curve, resume_log),
        of_run("lease", "run/lease/000001.json", take_lease),
        of_run("lease beat", "run/lease/000001.beat", take_lease),
        of_run("replay file", failure, compute_again),
    ]  # fmt: skip


def _write_failure(folder: Path, shards: Path) -> str:
    """File of a step whose loss is not finite, made by a recipe with a far too large rate."""
    config = recipe(folder / "failed", shards)
    optim = OptimConfig(learning_rate=9e18, warmup_steps=0)
    with pytest.raises(UserError, match="--replay"):
        train(replace(config, optim=optim, max_steps=9, checkpoint_every=100))
    (file,) = (folder / "failed" / "failures").iterdir()
    (folder / "failure.safetensors").write_bytes(file.read_bytes())
    shutil.rmtree(folder / "failed")
    return "failure.safetensors"


def read_checkpoint(box: Path) -> object:
    saved = fetch_newest(str(box / "run"), box / "cache")
    if saved is None:  # the file that commits the checkpoint is missing
        return None
    with open_tensors(saved, box / "cache") as read:
        tensors = {name: read(name) for part in saved.parts for name in part.tensors}
    return saved.state, saved.scalars, saved.backbone, tensors


def read_weights(box: Path) -> object:
    backbone, info = load_weights(str(box / "run"))
    return backbone.state_dict(), info, asdict(backbone.config)


def read_curve(box: Path) -> object:
    run = read_run(str(box / "run"), "run")
    return run.recipe, run.backbone, run.curve, describe_progress("train", str(box / "run"))


def compare_recipe(box: Path) -> object:
    # A run may not change the place of its held-out shards, which is not this folder.
    return check_recipe(replace(recipe(box / "run", box / "shards"), validation=ValidationConfig()))


def resume_log(box: Path) -> object:
    from ifvit.training.checkpoint import TrainState
    from ifvit.training.metrics_log import MetricsLog

    engine = SimpleNamespace(
        world=SimpleNamespace(is_main=True, size=1), device=torch.device("cpu"),
        timer=SimpleNamespace(take=dict),
    )  # fmt: skip
    config = recipe(box / "run", box)
    with MetricsLog(config, engine).open(TrainState(step=1)):  # type: ignore[arg-type]
        pass
    return (box / "run" / "metrics.jsonl").read_text()


def take_lease(box: Path) -> object:
    real = time.sleep

    def sleep(seconds: float) -> None:
        assert seconds <= 60, f"waits {seconds} s"

    time.sleep = sleep
    try:
        Lease.acquire(str(box / "run"), beat_seconds=0.01)
    finally:
        time.sleep = real
    return "taken"


def compute_again(box: Path) -> object:
    return replay(ReplayConfig(file=str(box / "failure.safetensors")))


def _estimate(value: float) -> Estimate:
    return Estimate(value=value, standard_error=0.1, num_samples=9, low=0.0, high=9.0)


def make_evaluation(folder: Path) -> list[Format]:
    protocol = Protocol(
        name="scenes", num_samples=2, caption_rule="first", score_caption="same",
        sampling=SamplingConfig(num_steps=2).settings, image_size=16,
        resize="center_crop+lanczos", prompts_sha256="a" * 64, features="scenes/clip",
        features_sha256="b" * 64, paper_prefix="", inception=None, inception_sha256=None,
        num_reference_images=2, reference_sha256="c" * 64,
    )  # fmt: skip
    row = MetricsRow(
        weights="run", weights_sha256="d" * 64, step=2, ema_decay=0.9, protocol=protocol,
        frechet_distance=_estimate(0.12), clip_score=_estimate(0.6),
        clip_score_paper=_estimate(1.5), retrieval_at_16=_estimate(0.5),
        held_out_loss=_estimate(0.4), target="epsilon of vae 0123456789ab x 1",
    )  # fmt: skip
    run = folder / "run"
    url = row_url(str(run / FOLDER), "scenes", 2.0, 2)
    scores = {"count": False, "colour": True, "kind": True, "relation": None}
    rows = [
        SampleRow(file=f"{n:05d}.png", prompt="a square", position=n, image_id=n,
                  real="real_00000.png" if n == 0 else None, clip_score=0.5, scores=scores)
        for n in range(2)
    ]  # fmt: skip
    samples = Path(samples_url(url))
    samples.mkdir(parents=True)
    write_samples(str(samples), rows)
    for name in ("00000.png", "00001.png", "real_00000.png"):
        (samples / name).write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8)))
    write_sealed(url, row)
    counts = row_url(str(run / FOLDER), "counts", 2.0, 2)
    write_sealed(counts, made_row())
    names = {"evaluation row": url, "object count row": counts}
    names["evaluation samples.jsonl"] = str(samples / "samples.jsonl")
    return [
        Format(name=name, folder=folder, file=Path(file).relative_to(folder).as_posix(),
               readers=(read_evaluation,), sealed=True)
        for name, file in names.items()
    ]  # fmt: skip


def read_evaluation(box: Path) -> object:
    run = read_run(str(box / "run"), "run")
    samples = [
        (folder, sample)
        for row in run.rows
        for folder in [samples_folder(run, row)]
        for sample in read_samples(folder)
    ]
    files = [(folder, name) for folder, one in samples for name in (one.file, one.real) if name]
    images = [decode_png(read_bytes(f"{folder}/{name}")) for folder, name in files]
    counts = read_object_counts(str(box / "run" / FOLDER))
    return run.rows, samples, images, counts


def make_attention(folder: Path) -> list[Format]:
    mean = PromptMean(value=0.5, standard_error=0.1)
    text = TextSpectrum(singular_values=(mean, mean), effective_rank=mean)
    layers = tuple(
        LayerNumbers(name=name, time_share=mean, image_share=mean, text_share=mean, text=text)
        for name in layer_names("2*concat")
    )
    protocol = AttentionProtocol(
        num_prompts=2, prompts_sha256="a" * 64, sampling=SamplingConfig().settings, trim=0
    )
    summary = AttentionSummary(
        weights="run", weights_sha256="b" * 64, step=2, fusion="2*concat", num_text_blocks=0,
        protocol=protocol, layers=layers, image_maps=np.full((2, 4, 4), 0.2),
        text_maps=dict.fromkeys((0, 1), np.full((3, 4), 0.1)),
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_attention(str(folder / "attention.json"), summary)
    return [
        Format(name="attention numbers", folder=folder, file="attention.json",
               readers=(read_maps,), sealed=True),
        Format(name="attention maps", folder=folder, file="attention.npz", readers=(read_maps,),
               sealed=True, hashed_in=("attention.json",)),
    ]  # fmt: skip


def read_maps(box: Path) -> object:
    return read_attention(str(box / "attention.json"))


def make_knockout(folder: Path) -> list[Format]:
    change = Estimate(value=-0.5, standard_error=0.1, num_samples=4, low=-0.7, high=-0.3)
    rows = tuple(
        KnockoutRow(
            kind=kind, first=first, last=last, held_out_loss=change, by_timestep=(change,) * 8,
            clip_score=change,
        )
        for kind in ("off", "only")
        for first, last in list_windows("2*concat")
    )  # fmt: skip
    protocol = KnockoutProtocol(
        windows="all", num_samples=4, seed=0, shards_sha256="a" * 64,
        null_context="zeros", alignment=None,
    )  # fmt: skip
    analysis = KnockoutAnalysis(
        weights="run", weights_sha256="b" * 64, step=2, fusion="2*concat", num_text_blocks=0,
        target="noise", protocol=protocol, held_out_loss=change, clip_score=change,
        scene_accuracy=None, rows=rows,
    )  # fmt: skip
    file = f"{KNOCKOUT_FOLDER}/step_00000002.json"
    (folder / KNOCKOUT_FOLDER).mkdir(parents=True)
    write_sealed(str(folder / file), analysis)
    return [
        Format(name="knock-out", folder=folder, file=file, readers=(plot_knockout,), sealed=True)
    ]


def plot_knockout(box: Path) -> object:
    found = read_knockout(str(box))
    return found and (knockout_figure({"run": found}), table_rows({"run": found}))[1]


def make_reference(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).normal(size=(9, 4))
    with (folder / "reference.npz").open("wb") as file:
        np.savez(
            file, num_images=9, images_sha256="a" * 64, image_size=16, resize="center_crop+lanczos",
            image_rules=str(ImageRules()),
            **{"clip.mean": values.mean(axis=0), "clip.covariance": np.cov(values.T),
               "clip.part": values.astype(np.float32), "clip.encoder": "scenes/clip",
               "clip.sha256": "b" * 64},
        )  # fmt: skip
    return [
        Format(name="reference statistics", folder=folder, file="reference.npz",
               readers=(read_statistics,), sealed=True)
    ]  # fmt: skip


def read_statistics(box: Path) -> object:
    identity = EncoderIdentity(name="scenes/clip", sha256="b" * 64)
    network = FeatureNetwork(embed=lambda images: images, identity=identity)
    networks = SimpleNamespace(features={CLIP: network}, clip=None, device="cpu")
    found = read_reference(str(box / "reference.npz"), 16, ImageRules(), networks)  # type: ignore[arg-type]
    return found.num_images, found.sha256, found.features()


def make_slurm(folder: Path) -> list[Format]:
    run = folder / "run"
    jobs = (JobRecord(job_id="7", verb="train", run=str(run)),)
    record = SubmissionRecord(
        submitted="2026-01-01T00:00:00+00:00", command=("ifvit",), commit="", jobs=jobs,
        token="0" * 64,
        folder=f"{run}/submitted/20260101",
    )  # fmt: skip
    write_record(str(run), record, "")
    start = Start(ended=1.0, exit_code=1, nodes="n1", progress="2", bad_nodes=())
    (folder / "7_starts.jsonl").write_bytes(dump_rows([start, replace(start, ended=2.0)]))
    (file,) = (run / "jobs").iterdir()
    return [
        Format(name="submission record", folder=folder, readers=(list_jobs,), sealed=True,
               file=file.relative_to(folder).as_posix()),
        Format(name="start records", folder=folder, file="7_starts.jsonl", readers=(list_starts,),
               sealed=True),
    ]  # fmt: skip


def list_jobs(box: Path) -> object:
    return read_records(str(box / "run"))


def list_starts(box: Path) -> object:
    return read_starts(box, "7")


RUNS = (make_run, make_evaluation, make_attention, make_knockout, make_reference, make_slurm)
