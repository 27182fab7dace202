"""The table of verbs: for each, its configuration class, its function and one line of help.

`cli` runs the verbs of this table; the package slurm submits the same functions as jobs.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One verb; `config` and `function` are `module:name`, imported only when the verb runs."""

    config: str
    function: str
    help: str
    positional: str | None = None
    """Fields that take the words before the first flag: one list field, or names with spaces."""


VERBS = {
    "demo": Verb(
        "ifvit.demo:DemoConfig", "ifvit.demo:demo", "run every stage on this machine, at small size"
    ),
    "scenes": Verb(
        "ifvit.scenes.config:ScenesConfig",
        "ifvit.scenes.image_sets:render_scenes",
        "render a set of captioned or labelled scenes",
    ),
    "encode": Verb(
        "data_pipeline.config:EncodeConfig",
        "data_pipeline.encode:encode",
        "captioned images -> shards",
    ),
    "shards inspect": Verb(
        "data_pipeline.config:InspectConfig",
        "data_pipeline.shard_tools:inspect_shards",
        "show the first samples of a dataset as a table and as pictures",
        positional="url",
    ),
    "shards verify": Verb(
        "data_pipeline.config:ShardsConfig",
        "data_pipeline.shard_tools:verify",
        "check every byte of a dataset",
        positional="url",
    ),
    "shards stats": Verb(
        "data_pipeline.config:ShardsConfig",
        "data_pipeline.shard_tools:stats",
        "print latent statistics, caption lengths and sizes of a dataset",
        positional="url",
    ),
    "shards merge": Verb(
        "data_pipeline.config:MergeConfig",
        "data_pipeline.shard_tools:merge",
        "several datasets of the same encoders -> one dataset",
        positional="urls",
    ),
    "train": Verb(
        "ifvit.training.config:TrainConfig",
        "ifvit.training.train:train",
        "shards -> a trained backbone; run again to resume",
    ),
    "train --replay": Verb(
        "ifvit.training.config:ReplayConfig",
        "ifvit.training.replay:replay",
        "repeat the step that ended a run",
        positional="file",
    ),
    "import": Verb(
        "ifvit.models.config:ImportConfig",
        "ifvit.models.published_weights:import_weights",
        "published weights of U-ViT or its fusion fork -> a run",
        positional="file run",
    ),
    "generate": Verb(
        "ifvit.sampling.config:GenerateConfig",
        "ifvit.sampling.generate:generate",
        "prompts or classes -> images",
    ),
    "export": Verb(
        "ifvit.sampling.config:ExportConfig",
        "ifvit.sampling.export:export",
        "trained weights -> a diffusers pipeline",
        positional="weights output",
    ),
    "evaluate": Verb(
        "ifvit.evaluation.config:EvaluateConfig",
        "ifvit.evaluation.evaluate:evaluate",
        "runs x guidance scales x alignment methods -> metrics or object counts",
    ),
    "evaluate --make_reference": Verb(
        "ifvit.evaluation.config:MakeReferenceConfig",
        "ifvit.evaluation.references:make_reference",
        "real images -> reference statistics for evaluations",
        positional="output",
    ),
    "analyze attention": Verb(
        "ifvit.analysis.config:AttentionConfig",
        "ifvit.analysis.attention_analysis:analyze_attention",
        "runs -> attention maps and singular values of each layer, as a figure",
        positional="runs",
    ),
    "cost": Verb(
        "ifvit.models.config:CostConfig",
        "ifvit.models.cost:cost",
        "parameters and GFLOPs of every preset",
    ),
    "cost --plan": Verb(
        "ifvit.analysis.config:PlanConfig",
        "ifvit.analysis.plan:plan",
        "estimate memory, time and traffic of training on many GPUs",
    ),
    "bench checkpoint": Verb(
        "ifvit.bench.config:BenchCheckpointConfig",
        "ifvit.bench.checkpoint_speed:bench_checkpoint",
        "time that checkpoints cost the training loop",
    ),
    "bench encode": Verb(
        "ifvit.bench.config:BenchEncodeConfig",
        "ifvit.bench.encoding_speed:bench_encode",
        "images/s of the encode job, relative to its models alone",
    ),
    "bench generate": Verb(
        "ifvit.bench.config:BenchGenerateConfig",
        "ifvit.bench.sampling_speed:bench_generate",
        "images/s of guided sampling, relative to the model without sharing and caches",
    ),
    "bench loader": Verb(
        "ifvit.bench.config:BenchLoaderConfig",
        "ifvit.bench.loading_speed:bench_loader",
        "samples/s of the loader, relative to other readers of the same samples",
    ),
    "bench train": Verb(
        "ifvit.bench.config:BenchTrainConfig",
        "ifvit.bench.training_speed:bench_train",
        "time of a training step, relative to a bare loop, U-ViT's recipe and the hardware",
    ),
    "report": Verb(
        "ifvit.studies.config:ReportConfig",
        "ifvit.studies.report:report",
        "runs -> one HTML page",
        positional="runs",
    ),
    "rate create": Verb(
        "ifvit.rating.config:CreateConfig",
        "ifvit.rating.create:create",
        "generated images -> a study for human raters; run again to see links and add raters",
        positional="study",
    ),
    "rate serve": Verb(
        "ifvit.rating.config:ServeConfig",
        "ifvit.rating.server:serve",
        "serve the web pages of raters and of the admin",
        positional="study",
    ),
    "rate report": Verb(
        "ifvit.rating.config:RateReportConfig",
        "ifvit.rating.pages:report",
        "answers -> one HTML page and its numbers",
        positional="study",
    ),
    "rate export": Verb(
        "ifvit.rating.config:RateExportConfig",
        "ifvit.rating.results:export",
        "answers -> CSV or JSON lines",
        positional="study",
    ),
    "report paper": Verb(
        "ifvit.studies.config:PaperConfig",
        "ifvit.studies.paper:report_paper",
        "runs -> the paper's tables and figures, the paper's numbers beside ours",
        positional="runs",
    ),
    "submit train": Verb(
        "slurm.config:SubmitTrainConfig",
        "slurm.submit:submit_train",
        "run ifvit train, or a grid of runs, as SLURM jobs that survive preemption",
    ),
    "submit encode": Verb(
        "slurm.config:SubmitEncodeConfig",
        "slurm.submit:submit_encode",
        "run ifvit encode as an array of jobs",
    ),
    "submit evaluate": Verb(
        "slurm.config:SubmitEvaluateConfig",
        "slurm.submit:submit_evaluate",
        "run ifvit evaluate, generating images in an array of jobs",
    ),
    "submit pipeline": Verb(
        "slurm.config:PipelineConfig",
        "slurm.pipeline:submit_pipeline",
        "run all stages as jobs that wait for each other",
    ),
    "submit status": Verb(
        "slurm.config:StatusConfig",
        "slurm.status:status",
        "print state, step, speed and remaining time of a run's jobs",
        positional="run",
    ),
    "submit logs": Verb(
        "slurm.config:LogsConfig",
        "slurm.status:logs",
        "print the log of a run's newest job",
        positional="run",
    ),
    "submit cancel": Verb(
        "slurm.config:CancelConfig",
        "slurm.status:cancel",
        "cancel the jobs of a run",
        positional="run",
    ),
}


def load(path: str) -> Any:
    """Import the object at `module:name`."""
    module, name = path.split(":")
    return getattr(import_module(module), name)
