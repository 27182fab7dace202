"""The arms of a page: their runs by seed, and the evaluations that can be compared."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ifvit import storage
from ifvit.evaluation import object_count
from ifvit.evaluation.object_count import ObjectCountRow, read_object_counts
from ifvit.evaluation.rows import FOLDER, MetricsRow, Protocol, differences, row_url, samples_url
from ifvit.evaluation.runs import Run, read_run
from ifvit.figures import COLOURS
from ifvit.models.config import FusionTransformerConfig
from ifvit.records import shorten
from ifvit.sampling.samples import SampleRow, read_samples
from ifvit.studies.comparisons import Arms, Evaluation
from ifvit.studies.config import StudyConfig
from ifvit.studies.quantities import Metric, SeedMean, mean_over_seeds
from ifvit.studies.recipes import StudyRun, arm_recipes, list_runs
from ifvit.training.config import MAY_CHANGE, TrainConfig

_FREE = (MAY_CHANGE - {"max_steps", "context", "text"}) | {"branch"}
"""Fields of a recipe that a run may set in another way than the study file: they are places, or do
not change what the run learns."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of one recipe by seed; `colour` is an index of COLOURS."""

    name: str
    colour: int
    runs: Mapping[int, Run]

    @property
    def first(self) -> Run | None:
        """The run of the first seed that is finished."""
        return next(iter(self.runs.values()), None)

    @property
    def backbone(self) -> FusionTransformerConfig | None:
        """The backbone, if it has a fusion map."""
        backbone = self.first and self.first.backbone
        return backbone if isinstance(backbone, FusionTransformerConfig) else None


@dataclass(frozen=True, order=True)
class Series:
    """Evaluations under one protocol name and guidance scale."""

    name: str
    scale: float

    def __str__(self) -> str:
        return f"{self.name}/w{self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The arms of a page and what was measured on them, as far as it can be compared.

    `series` are all series of evaluations, the main one first. `rows` are the rows of a run, by its
    name, whose protocols agree up to the guidance scale; `counts` its object counts. `excluded` are
    sentences about evaluations that are left out.
    """

    arms: Sequence[Arm]
    series: Sequence[Series]
    rows: Mapping[str, Sequence[MetricsRow]]
    counts: Mapping[str, ObjectCountRow]
    excluded: Sequence[str]
    at_end: bool
    """Whether only evaluations of the last training step are compared."""

    @property
    def runs(self) -> list[Run]:
        """The runs of all arms."""
        return [run for arm in self.arms for run in arm.runs.values()]

    def history(self, run: Run, series: Series) -> list[MetricsRow]:
        """Return the rows of one series by step."""
        return [row for row in self.rows[run.name] if series_of(row) == series]

    def last(self, run: Run, series: Series) -> MetricsRow | None:
        """Return the row of the last step, which is compared; None without it."""
        rows = self.history(run, series)
        if rows and self.at_end and run.end and rows[-1].step != run.end.step:
            return None
        return rows[-1] if rows else None

    def evaluations(self, series: Series | None) -> dict[str, dict[int, Evaluation]]:
        """Return what is compared in one series, with the object counts; None: only these."""
        found: dict[str, dict[int, Evaluation]] = {arm.name: {} for arm in self.arms}
        for arm in self.arms:
            for seed, run in arm.runs.items():
                row = self.last(run, series) if series else None
                counts = self.counts.get(run.name)
                if row or counts:
                    samples = read_samples(samples_folder(run, row)) if row else []
                    found[arm.name][seed] = Evaluation(row=row, samples=samples, counts=counts)
        return found


def series_of(row: MetricsRow) -> Series:
    """Return the series that a row belongs to."""
    return Series(row.protocol.name, row.protocol.guidance_scale)


def samples_folder(run: Run, row: MetricsRow) -> str:
    """URL of the folder of the samples behind a row."""
    name, scale = row.protocol.name, row.protocol.guidance_scale
    return samples_url(row_url(storage.join(run.url, FOLDER), name, scale, row.step))


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A caption, the URL of its real image, and by arm the URL of the image generated for it.

    None stands for an image that is missing. `marks` say by arm what is right about a scene.
    """

    caption: str
    real: str | None
    images: Mapping[str, str | None]
    marks: Mapping[str, Mapping[str, bool]]


def caption_rows(selection: Selection, evaluations: Arms, count: int) -> list[Captioned]:
    """Return the first captions of the evaluations with the images of the first shared seed.

    An arm without this seed shows its own first seed. Raises UserError for a link out of a run.
    """
    seeds = {
        arm: {seed for seed, one in own.items() if one.row} for arm, own in evaluations.items()
    }
    shared = set.intersection(*filter(None, seeds.values())) if any(seeds.values()) else set()
    samples: dict[str, dict[tuple[object, str], SampleRow]] = {}
    urls: dict[str, Callable[[str], str | None]] = {}
    for arm in selection.arms:
        if own := seeds[arm.name]:
            seed = min(shared or own)
            run, found = arm.runs[seed], evaluations[arm.name][seed]
            assert found.row
            urls[arm.name] = partial(_image, run, samples_folder(run, found.row))
            samples[arm.name] = {(s.image_id, s.prompt): s for s in found.samples}
    rows = []
    for key in list(dict.fromkeys(key for own in samples.values() for key in own))[:count]:
        named = {name: own[key] for name, own in samples.items() if key in own}
        reals = (urls[name](sample.real) for name, sample in named.items() if sample.real)
        files = {name: urls[name](sample.file) for name, sample in named.items()}
        marks = {
            name: {aspect: is_right for aspect, is_right in scores if is_right is not None}
            for name, sample in named.items()
            for scores in [(sample.scores or {}).items()]
        }
        rows.append(
            Captioned(
                caption=shorten(key[1], 1000),
                real=next(filter(None, reals), None),
                images={name: files.get(name) for name in samples},
                marks=marks,
            )
        )
    return rows


def _image(run: Run, folder: str, file: str) -> str | None:
    """Return the URL of a file of samples; None without it."""
    url = storage.join(folder, file)
    return run.locate(url) if storage.exists(url) else None


def as_arms(runs: Sequence[Run]) -> list[Arm]:
    """Return an arm for each run."""
    return [
        Arm(name=run.name, colour=number % len(COLOURS), runs={0: run})
        for number, run in enumerate(runs)
    ]


def plan_runs(config: StudyConfig) -> list[StudyRun]:
    """Return all runs of a study; if it matches seconds, from the file that `study run` wrote."""
    seconds = None
    if config.match == "seconds":
        if not storage.exists(storage.join(config.folder, "plan.json")):
            config = replace(config, match="steps")  # nothing was trained
        else:
            from ifvit.studies.step_time import find_step_seconds  # imports the training engine

            recipes = arm_recipes(config)
            seconds = find_step_seconds(config.folder, recipes, config.reference_arm)
    return list_runs(config, seconds)


def read_arms(config: StudyConfig, planned: Sequence[StudyRun]) -> tuple[list[Arm], list[str]]:
    """Read the runs of a study; return the arms, and a sentence about each run that is not shown.

    A run is shown when it is trained to its end with the recipe of the study.
    """
    found: dict[str, dict[int, Run]] = {arm: {} for arm in config.arms}
    absent = []
    for each in planned:
        url = each.recipe.run
        run = read_run(url, each.name) if storage.exists(url) else None
        reason = _why_absent(each, run)
        if run and not reason:
            found[each.arm][each.seed] = run
        else:
            absent.append(f"{each.name}: {reason}")
    arms = [
        Arm(name=name, colour=number % len(COLOURS), runs=dict(sorted(runs.items())))
        for number, (name, runs) in enumerate(found.items())
    ]
    return arms, absent


def _flatten_recipe(recipe: TrainConfig) -> dict[str, Any]:
    return flatten(json.loads(json.dumps(asdict(recipe))))


def _why_absent(planned: StudyRun, run: Run | None) -> str:
    """Return why a run is not shown; empty if it is."""
    if run is None or run.end is None:
        return "not started"
    expected, stored = _flatten_recipe(planned.recipe), flatten(run.recipe or {})
    changed = [
        f"{key} {shorten(stored[key], 40)}, in the study {shorten(value, 40)}"
        for key, value in expected.items()
        if key in stored and stored[key] != value and key.partition(".")[0] not in _FREE
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"trained with another recipe: {'; '.join(changed[:3])}{more}"
    if run.end.step < planned.recipe.max_steps:
        return f"at step {run.end.step:,} of {planned.recipe.max_steps:,}"
    return "" if run.backbone else "it has no weights"


def flatten(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"learning_rate": 1}}` => `{"optim.learning_rate": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def select(arms: Sequence[Arm], first: Sequence[Series] = (), *, at_end: bool = False) -> Selection:
    """Select the evaluations that can be compared.

    Rows of one protocol name compare if their protocols agree with the most frequent one, up to the
    guidance scale. The series `first` come first, then those with most rows. With `at_end`, only
    evaluations of the last training step are compared.
    """
    runs = [run for arm in arms for run in arm.runs.values()]
    usual = _usual_protocols([row.protocol for run in runs for row in run.rows])
    rows: dict[str, list[MetricsRow]] = {run.name: [] for run in runs}
    excluded = []
    for run, row in [(one, row) for one in runs for row in one.rows]:
        if found := differences(_without_scale(row.protocol), usual[row.protocol.name]):
            where = f"{series_of(row)} at step {row.step:,}"
            excluded.append(f"{run.name} is left out of {where}: {'; '.join(found)}.")
        else:
            rows[run.name].append(row)
    num_rows = Counter(series_of(row) for kept in rows.values() for row in kept)
    order = [one for one in first if one in num_rows]
    order += sorted(num_rows.keys() - order, key=lambda one: (-num_rows[one], one))
    counts, others = read_counts(runs)
    selection = Selection(
        arms=arms, series=order, rows=rows, counts=counts, excluded=(), at_end=at_end
    )
    missing = [
        f"{run.name} has no evaluation {order[0]} that can be compared"
        + (f" at its last step, {run.end.step:,}." if at_end and run.end else ".")
        for run in runs
        if order and not selection.last(run, order[0])
    ]
    return replace(selection, excluded=[*excluded, *others, *missing])


def _without_scale(protocol: Protocol) -> Protocol:
    return replace(protocol, sampling=protocol.sampling | {"guidance_scale": 0.0})


def _usual_protocols(protocols: Sequence[Protocol]) -> dict[str, Protocol]:
    """Protocol name => the most frequent protocol without its scale; the first of equal ones."""
    groups: dict[str, list[list[Protocol]]] = {}
    for protocol in map(_without_scale, protocols):
        same_name = groups.setdefault(protocol.name, [])
        group = next((g for g in same_name if not differences(g[0], protocol)), None)
        if group is None:
            same_name.append(group := [])
        group.append(protocol)
    return {name: max(same_name, key=len)[0] for name, same_name in groups.items()}


def read_counts(runs: Sequence[Run]) -> tuple[dict[str, ObjectCountRow], list[str]]:
    """Return the newest object counts of each run by its name, and who is left out.

    A run is left out if its protocol or its list of prompts differs from that of the first run.
    """
    rows: dict[str, ObjectCountRow] = {}
    excluded = []
    for run in runs:
        for row in read_object_counts(storage.join(run.url, FOLDER))[-1:]:
            first = next(iter(rows.values()), row)
            reasons = object_count.differences(first.protocol, row.protocol)
            reasons += ["list of prompts"] if row.group_sizes != first.group_sizes else []
            if reasons:
                excluded.append(f"{run.name} was counted with another {', '.join(reasons)}.")
            else:
                rows[run.name] = row
    return rows, excluded


def means_of(arms: Arms, metric: Metric) -> dict[str, SeedMean]:
    """Return the mean over seeds of each arm for which the metric was measured."""
    found = {
        name: [estimate for one in seeds.values() if (estimate := one.estimate(metric))]
        for name, seeds in arms.items()
    }
    return {name: mean_over_seeds(estimates) for name, estimates in found.items() if estimates}


def operations_per_step(run: Run) -> float | None:
    """Return the operations of a training step; a backward pass costs two forward passes."""
    batch = run.facts.global_batch_size
    return 3.0 * run.cost.flops * batch if run.cost and batch else None
