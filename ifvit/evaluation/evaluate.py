"""The verb `evaluate`: weights x guidance scales x alignment methods => rows and their samples."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ifvit import storage
from ifvit.distributed import choose_device, open_process_group
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.evaluation.measure import CaptionMetrics, ObjectCounting
from ifvit.evaluation.metrics import estimate_mean
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import FOLDER, MetricsRow, estimates_of, row_url, samples_url
from ifvit.evaluation.sample_set import generate_missing
from ifvit.images import encode_png, make_grid
from ifvit.models.weights import find_weights, run_of, step_name
from ifvit.sampling.load import load_model, load_sampler
from ifvit.sampling.samples import claim_folder, read_images, read_samples

_NUM_SHOWN = 8
"""Prompts in the grid that compares alignment methods."""


def evaluate(config: EvaluateConfig) -> list[MetricsRow | ObjectCountRow]:
    """Generate, measure and write a row for every chosen step, guidance scale and method.

    Existing samples and rows are kept. Under torchrun or srun the processes share the work and all
    of them return the rows. One of several tasks generates its partition and returns no rows.
    Raises UserError for shards of other encoders than the backbone's, or for samples of other
    settings in the folder of a row.
    """
    run = run_of(find_weights(config.weights))  # weights need not belong to a run
    output = config.output or storage.join(run or ".", FOLDER)
    storage.require_no_links_out(config.output or run or output)
    rows: list[MetricsRow | ObjectCountRow] = []
    urls = []
    with open_process_group() as group:
        world = group.world
        counts = config.protocol.object_count.prompts is not None
        measurement = ObjectCounting(config, group) if counts else CaptionMetrics(config, group)
        partition = measurement.prompts[config.task :: config.num_tasks][world.rank :: world.size]
        for weights in _list_weights(config):
            model = load_model(weights, choose_device(config.device), config)
            opened = None
            for protocol in _list_protocols(config):
                sampling, step = protocol.sampling, model.info.step
                url = row_url(output, protocol.name, sampling.guidance_scale, step)
                row = measurement.find_row(url, model, protocol) if config.num_tasks == 1 else None
                if row is None:
                    if opened is None:  # rows that exist need neither encoder nor autoencoder
                        conditions = measurement.open_conditions(model)
                        opened = conditions, load_sampler(model, conditions.null, sampling)
                    folder = samples_url(url)
                    identity = {
                        "weights_sha256": model.sha256,
                        "null_context": model.info.null_context,
                        **measurement.sources,
                    }
                    claim_folder(folder, sampling.settings | identity)
                    seconds = generate_missing(folder, partition, *opened, model.info, sampling)
                    group.gather(None)  # waits until all processes have generated their images
                    if config.num_tasks > 1:
                        continue
                    row = measurement.measure(url, model, protocol, seconds)
                if world.is_main:
                    sys.stdout.write(f"{url}\n{_format(row)}\n")
                rows.append(row)
                urls.append(url)
        if world.is_main and len(config.methods) > 1:
            _compare_methods(config.methods, urls)
    return rows


def _list_weights(config: EvaluateConfig) -> list[str]:
    """The weights folders to evaluate. Raises UserError for steps that the run does not have."""
    if config.steps is None:
        return [config.weights]
    folder = storage.join(config.weights, "weights")
    saved = [name for name in storage.list_names(folder) if name.startswith("step_")]
    wanted = saved if config.steps == "all" else [step_name(step) for step in config.steps]
    missing = sorted(set(wanted) - set(saved))
    if missing or not wanted:
        there = ", ".join(saved) or "none"
        raise UserError(f"{folder}: no {', '.join(missing) or 'weights'}; there are: {there}")
    return [storage.join(folder, name) for name in wanted]


def _list_protocols(config: EvaluateConfig) -> list[ProtocolConfig]:
    """The protocol at every guidance scale and with every alignment method, which vary fastest.

    Rows of another method than the protocol's have a folder of their own, PROTOCOL_METHOD.
    """
    own = config.protocol
    return [
        replace(
            own,
            name=own.name if method == own.sampling.method else f"{own.name}_{method}",
            sampling=replace(own.sampling, guidance_scale=scale, method=method),
        )
        for scale in config.guidance_scales or [own.sampling.guidance_scale]
        for method in config.methods or [own.sampling.method]
    ]


def _format(row: MetricsRow | ObjectCountRow) -> str:
    """The metrics of a row, or its scores over all images, with their intervals."""
    found = estimates_of(row) if isinstance(row, MetricsRow) else vars(row.score())
    return "\n".join(
        f"{name:20}{one.value:10.4f}  [{one.low:.4f}, {one.high:.4f}]"
        for name, one in found.items()
    )


def _compare_methods(methods: Sequence[str], urls: Sequence[str]) -> None:
    """Write a grid of prompts x methods beside every first row, and print the gains in CLIP Score.

    `urls` are those of the rows; methods vary fastest. The gain is the mean difference of the raw
    cosine from the first method, image by image.
    """
    for start in range(0, len(urls), len(methods)):
        series = urls[start : start + len(methods)]
        folders = [samples_url(url) for url in series]
        samples = [read_samples(folder) for folder in folders]
        columns = [
            read_images(storage.join(folder, one.file) for one in listed[:_NUM_SHOWN])
            for folder, listed in zip(folders, samples, strict=True)
        ]
        cells = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
        grid = f"{folders[0]}_methods.png"
        storage.write_bytes(grid, encode_png(make_grid(cells, len(methods))))
        sys.stdout.write(f"{grid}\n")
        cosines = [np.array([one.clip_score for one in listed], float) for listed in samples]
        for method, found in zip(methods[1:], cosines[1:], strict=True):
            if not np.isnan(found).any():  # object counts have no CLIP Score
                gain = estimate_mean(found - cosines[0])
                sys.stdout.write(
                    f"CLIP Score of {method} above {methods[0]}: {gain.value:+.4f}  "
                    f"[{gain.low:+.4f}, {gain.high:+.4f}]\n"
                )
