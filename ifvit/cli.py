"""The command line: one table of verbs, each a configuration class and a function."""

import errno
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ifvit.config import read_config
from ifvit.errors import UserError


@dataclass(frozen=True)
class Verb:
    """Where a verb lives, as `module:name`; imported only when the verb is called."""

    config: str
    function: str
    help: str
    positional: str | None = None
    """Field that takes the words before the first flag, as in `ifvit shards verify URL`; of
    several, separated by spaces, each takes one."""


VERBS = {
    "demo": Verb(
        "ifvit.demo_config:DemoConfig", "ifvit.demo:demo", "the whole path on this machine, small"
    ),
    "scenes": Verb(
        "ifvit.scenes.config:ScenesConfig",
        "ifvit.scenes.image_sets:render_scenes",
        "draw an image set, captioned in COCO's layout or in class folders",
    ),
    "encode": Verb(
        "data_pipeline.config:EncodeConfig",
        "data_pipeline.encode:encode",
        "captioned images -> shards",
    ),
    "shards inspect": Verb(
        "data_pipeline.config:InspectConfig",
        "data_pipeline.shard_tools:inspect_shards",
        "the first samples of a dataset, as a table and as pictures",
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
        "latent statistics, caption lengths, sizes",
        positional="url",
    ),
    "shards merge": Verb(
        "data_pipeline.config:MergeConfig",
        "data_pipeline.shard_tools:merge",
        "several datasets of the same encoders -> one",
        positional="urls",
    ),
    "train": Verb(
        "ifvit.training.config:TrainConfig",
        "ifvit.training.train:train",
        "shards -> a trained backbone; run again to resume",
    ),
    "train --replay": Verb(
        "ifvit.training.config:ReplayConfig",
        "ifvit.training.guards:replay",
        "compute again the step that ended a run",
        positional="file",
    ),
    "import": Verb(
        "ifvit.models.config:ImportConfig",
        "ifvit.models.published_weights:import_weights",
        "weights of U-ViT or its fusion fork -> a run",
        positional="file run",
    ),
    "generate": Verb(
        "ifvit.sampling.config:GenerateConfig",
        "ifvit.sampling.generate:generate",
        "prompts -> images",
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
        "checkpoints x guidance scales -> rows of metrics",
    ),
    "evaluate --make_reference": Verb(
        "ifvit.evaluation.config:MakeReferenceConfig",
        "ifvit.evaluation.references:make_reference",
        "real images -> the file that evaluations compare with",
        positional="output",
    ),
    "compare-methods": Verb(
        "ifvit.evaluation.config:CompareConfig",
        "ifvit.evaluation.evaluate:compare_methods",
        "runs x alignment methods -> one table of metrics and a grid",
        positional="runs",
    ),
    "analyze attention": Verb(
        "ifvit.analysis.config:AttentionConfig",
        "ifvit.analysis.attention_analysis:analyze_attention",
        "runs -> attention maps and singular values by layer, a figure",
        positional="runs",
    ),
    "count-objects": Verb(
        "ifvit.evaluation.config:ObjectCountConfig",
        "ifvit.studies.object_counts:count_objects_of_runs",
        "runs -> how often a prompt for three apples shows three",
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
        "memory, time and traffic of training on many GPUs, by formulas",
    ),
    "bench checkpoint": Verb(
        "ifvit.bench.config:BenchCheckpointConfig",
        "ifvit.bench.checkpoint_speed:bench_checkpoint",
        "what checkpoints cost the training loop",
    ),
    "bench encode": Verb(
        "ifvit.bench.config:BenchEncodeConfig",
        "ifvit.bench.encoding_speed:bench_encode",
        "images/s of the encode job, against its models alone",
    ),
    "bench generate": Verb(
        "ifvit.bench.config:BenchGenerateConfig",
        "ifvit.bench.sampling_speed:bench_generate",
        "images/s of guided sampling, against the same model without sharing and caches",
    ),
    "bench loader": Verb(
        "ifvit.bench.config:BenchLoaderConfig",
        "ifvit.bench.loading_speed:bench_loader",
        "batches a second, against other ways to read the same samples",
    ),
    "bench train": Verb(
        "ifvit.bench.config:BenchTrainConfig",
        "ifvit.bench.training_speed:bench_train",
        "seconds a training step, against a bare loop, U-ViT's recipe and the hardware",
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
        "the raters' web page, and the admin's",
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
        "runs -> the paper's tables and figures, with its numbers beside ours",
        positional="runs",
    ),
    "submit train": Verb(
        "slurm.config:SubmitTrainConfig",
        "slurm.submit:submit_train",
        "ifvit train as a SLURM job that survives preemption",
    ),
    "submit encode": Verb(
        "slurm.config:SubmitEncodeConfig",
        "slurm.submit:submit_encode",
        "ifvit encode as an array of jobs",
    ),
    "submit evaluate": Verb(
        "slurm.config:SubmitEvaluateConfig",
        "slurm.submit:submit_evaluate",
        "ifvit evaluate, its drawing as an array of jobs",
    ),
    "submit sweep": Verb(
        "slurm.config:SubmitSweepConfig",
        "slurm.submit:submit_sweep",
        "a grid of training runs as an array of jobs",
    ),
    "submit pipeline": Verb(
        "slurm.config:PipelineConfig",
        "slurm.pipeline:submit_pipeline",
        "encode, train, evaluate and report as jobs that wait for each other",
    ),
    "submit status": Verb(
        "slurm.config:StatusConfig",
        "slurm.status:status",
        "state, step, speed and time left of a run's jobs",
        positional="run",
    ),
    "submit logs": Verb(
        "slurm.config:LogsConfig",
        "slurm.status:logs",
        "log of a run's newest job",
        positional="run",
    ),
    "submit cancel": Verb(
        "slurm.config:CancelConfig", "slurm.status:cancel", "cancel a run's jobs", positional="run"
    ),
}


_BAD_PLACES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT),
}
"""What is wrong with a folder or its disk, whatever the verb does there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; a user error is one line on stderr and exit code 2."""
    # Their notices (no torchvision, no CUDA) would stand before our own one-line errors.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        name, rest = _split(arguments)
        verb = VERBS[name]
        config = read_config(
            _load(verb.config), rest, prog=f"ifvit {name}", positional=verb.positional
        )
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        _load(verb.function)(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _BAD_PLACES:
            raise
        print(f"error: {error}; mend that or choose another place", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """`["shards", "verify", "x"]` => `("shards verify", ["x"])`; prints help when asked."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    if not arguments or arguments[-1] in ("-h", "--help"):
        _print_verbs(arguments[0] if len(arguments) > 1 else "")
        sys.exit(0)
    known = ", ".join(VERBS)
    raise UserError(f"ifvit: no verb `{' '.join(arguments[:2])}`; choose one of {known}")


def _print_verbs(prefix: str) -> None:
    print("usage: ifvit VERB [--config RECIPE.yaml] [--flag value ...]\n")
    for name, verb in VERBS.items():
        if name.startswith(prefix):
            print(f"  {name:<18}{verb.help}")
    print("\nifvit VERB --help lists a verb's flags.")


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
