"""What is done for each run of a study: training, evaluations, analyses; and what is done already.

`study run` calls `run_stages` in a process per run; `submit study` in all tasks of a job.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from ifvit.analysis.attention_analysis import analyze_attention
from ifvit.analysis.config import AttentionConfig, KnockoutConfig
from ifvit.analysis.knockout_analysis import analyze_knockout
from ifvit.distributed import open_process_group
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.models.config import FusionTransformerConfig
from ifvit.records import Sha256, record
from ifvit.sampling.samples import hash_json
from ifvit.storage import exists, join, read_sealed, write_sealed
from ifvit.studies.config import RECORD, StudyConfig
from ifvit.studies.recipes import StudyRun
from ifvit.training.config import MAY_CHANGE
from ifvit.training.train import train

_DECISIVE = {
    *("shards", "vae", "text_encoder", "context", "text", "engine", "max_steps", "validation")
}
"""Fields that a resumed run may change, although they decide what its results are."""
_OF_PLACE = (MAY_CHANGE - _DECISIVE) | {"runs", "weights", "output", "device"}
"""Settings that change where and how a run works, but no result of it."""

Stage = tuple[Callable[[Any], object], Any]
"""The function of a verb and its configuration."""


@record
class RunRecord:
    """The end of all stages of a run, in RUN/study.json."""

    stages_sha256: Sha256
    """Hash of what the stages were: the recipe, and the settings of evaluations and analyses."""


def list_stages(config: StudyConfig, run: StudyRun) -> list[Stage]:
    """Return what is done for a run, in this order, after its training."""
    url, backbone = run.recipe.run, run.recipe.backbone
    stages: list[Stage] = [
        (evaluate, EvaluateConfig(**vars(settings), weights=url)) for settings in config.evaluate
    ]
    if run.seed == config.seeds[0] and isinstance(backbone, FusionTransformerConfig):
        if config.attention and backbone.text_key_blocks:
            attention = AttentionConfig(**vars(config.attention), runs=[url])
            stages.append((analyze_attention, attention))
        if config.knockout and len(backbone.text_blocks) == len(backbone.blocks):
            stages.append((analyze_knockout, KnockoutConfig(**vars(config.knockout), runs=[url])))
    return stages


def run_stages(config: StudyConfig, run: StudyRun) -> None:
    """Do what a run lacks; all processes of a launch call this together.

    Raises the errors of training and evaluation.
    """
    if is_finished(config, run):
        return
    train(run.recipe)
    gc.collect()  # cycles would keep the engine in the memory that evaluations need
    with open_process_group() as group:
        for function, settings in list_stages(config, run):
            if function is evaluate:  # whose work the processes share
                function(settings)
            else:
                group.on_main(partial(_call, function, settings))
        url, done = join(run.recipe.run, RECORD), describe_stages(config, run)
        group.on_main(lambda: write_sealed(url, done))


def _call(function: Callable[[Any], object], settings: Any) -> None:
    function(settings)  # whose result the other processes do not need


def is_finished(config: StudyConfig, run: StudyRun) -> bool:
    """Whether all stages of the run have been done with the recipe and settings of the study."""
    url = join(run.recipe.run, RECORD)
    return exists(url) and read_sealed(RunRecord, url) == describe_stages(config, run)


def describe_stages(config: StudyConfig, run: StudyRun) -> RunRecord:
    """Return the record of a run whose stages are done."""
    configs = [run.recipe, *(settings for _, settings in list_stages(config, run))]
    kept = [
        {key: value for key, value in asdict(one).items() if key not in _OF_PLACE}
        for one in configs
    ]
    return RunRecord(stages_sha256=hash_json(kept))
