"""The table of verbs: the configuration class and the function of each.

`cli` runs the verbs of this table; the package slurm submits the same functions as jobs.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ifvit.errors import UserError


@dataclass(frozen=True)
class Verb:
    """One verb; `config` and `function` are `module:name`, imported only when they are needed."""

    config: str
    function: str
    positional: str | None = None
    """Fields that take the words before the first flag: one list field, or names with spaces, or
    `config` for a recipe."""

    @property
    def help(self) -> str:
        """First sentence of the docstring of the configuration class."""
        return " ".join(load(self.config).__doc__.split()).split(". ")[0].rstrip(".")


VERBS = {
    "demo": Verb("ifvit.demo:DemoConfig", "ifvit.demo:demo"),
    "scenes": Verb("ifvit.scenes:ScenesConfig", "ifvit.scenes.image_sets:render_scenes"),
    "encode": Verb("data_pipeline.config:EncodeConfig", "data_pipeline.encode:encode"),
    "shards inspect": Verb(
        "data_pipeline.config:InspectConfig", "data_pipeline.shard_tools:inspect_shards", "url"
    ),
    "shards verify": Verb(
        "data_pipeline.config:ShardsConfig", "data_pipeline.shard_tools:verify", "url"
    ),
    "shards stats": Verb(
        "data_pipeline.config:StatsConfig", "data_pipeline.shard_tools:stats", "url"
    ),
    "shards merge": Verb(
        "data_pipeline.config:MergeConfig", "data_pipeline.shard_tools:merge", "urls"
    ),
    "train": Verb("ifvit.training.config:TrainConfig", "ifvit.training.train:train"),
    "train --replay": Verb(
        "ifvit.training.config:ReplayConfig", "ifvit.training.replay:replay", "file"
    ),
    "import": Verb(
        "ifvit.models.config:ImportConfig",
        "ifvit.models.published_weights:import_weights",
        "file run",
    ),
    "generate": Verb("ifvit.sampling.config:GenerateConfig", "ifvit.sampling.generate:generate"),
    "export": Verb(
        "ifvit.sampling.config:ExportConfig", "ifvit.sampling.export:export", "weights output"
    ),
    "evaluate": Verb(
        "ifvit.evaluation.config:EvaluateConfig", "ifvit.evaluation.evaluate:evaluate"
    ),
    "evaluate --make_reference": Verb(
        "ifvit.evaluation.config:MakeReferenceConfig",
        "ifvit.evaluation.references:make_reference",
        "output",
    ),
    "analyze attention": Verb(
        "ifvit.analysis.config:AttentionConfig",
        "ifvit.analysis.attention_analysis:analyze_attention",
        "runs",
    ),
    "analyze knockout": Verb(
        "ifvit.analysis.config:KnockoutConfig",
        "ifvit.analysis.knockout_analysis:analyze_knockout",
        "runs",
    ),
    "cost": Verb("ifvit.models.config:CostConfig", "ifvit.models.cost:cost"),
    "cost --plan": Verb("ifvit.analysis.config:PlanConfig", "ifvit.analysis.plan:plan"),
    "bench checkpoint": Verb(
        "ifvit.bench.config:BenchCheckpointConfig", "ifvit.bench.checkpoint_speed:bench_checkpoint"
    ),
    "bench generate": Verb(
        "ifvit.bench.config:BenchGenerateConfig", "ifvit.bench.sampling_speed:bench_generate"
    ),
    "bench loader": Verb(
        "ifvit.bench.config:BenchLoaderConfig", "ifvit.bench.loading_speed:bench_loader"
    ),
    "bench quality": Verb(
        "ifvit.bench.config:BenchQualityConfig", "ifvit.bench.quality:bench_quality"
    ),
    "bench train": Verb(
        "ifvit.bench.config:BenchTrainConfig", "ifvit.bench.training_speed:bench_train"
    ),
    "study run": Verb(
        "ifvit.studies.config:StudyRunConfig", "ifvit.studies.run:run_study", "config"
    ),
    "study report": Verb(
        "ifvit.studies.config:StudyReportConfig",
        "ifvit.studies.study_page:report_study",
        "config",
    ),
    "report": Verb("ifvit.studies.config:ReportConfig", "ifvit.studies.study_page:report", "runs"),
    "rate create": Verb("ifvit.rating.config:CreateConfig", "ifvit.rating.create:create", "study"),
    "rate serve": Verb("ifvit.rating.config:ServeConfig", "ifvit.rating.server:serve", "study"),
    "rate report": Verb(
        "ifvit.rating.config:RateReportConfig", "ifvit.rating.results:report", "study"
    ),
    "rate export": Verb(
        "ifvit.rating.config:RateExportConfig", "ifvit.rating.results:export", "study"
    ),
    "submit train": Verb("slurm.config:SubmitTrainConfig", "slurm.submit:submit_train"),
    "submit encode": Verb("slurm.config:SubmitEncodeConfig", "slurm.submit:submit_encode"),
    "submit evaluate": Verb("slurm.config:SubmitEvaluateConfig", "slurm.submit:submit_evaluate"),
    "submit study": Verb("slurm.config:SubmitStudyConfig", "slurm.submit:submit_study", "config"),
    "submit status": Verb("slurm.config:StatusConfig", "slurm.status:status", "run"),
    "submit logs": Verb("slurm.config:LogsConfig", "slurm.status:logs", "run"),
    "submit cancel": Verb("slurm.config:CancelConfig", "slurm.status:cancel", "run"),
}


def load(path: str) -> Any:
    """Import the object at `module:name`."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def check_packages() -> None:
    """Raise UserError when `data_pipeline` or `slurm` is another distribution's package.

    ifvit installs three top-level packages, side by side; the names of two are not its own.
    """
    own = Path(__file__).resolve().parents[1]
    for name in ("data_pipeline", "slurm"):
        spec, expected = find_spec(name), own / name / "__init__.py"
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != expected or "ifvit" not in expected.read_text(errors="replace"):
            raise UserError(
                f"the package {name} of ifvit, {expected.parent}, is hidden or replaced by "
                f"{found or 'nothing'}; run ifvit from another folder, or install it again in a "
                "virtual environment of its own"
            )
