"""The arms of a page: their runs by seed, and the evaluations that can be compared."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ifvit import storage
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import FOLDER, MetricsRow, Protocol, differences, row_url, samples_url
from ifvit.evaluation.runs import Run, read_run
from ifvit.figures import COLOURS
from ifvit.records import shorten
from ifvit.sampling.samples import SampleRow, read_samples
from ifvit.studies.comparisons import Arms, Evaluation
from ifvit.studies.config import StudyConfig
from ifvit.studies.object_counts import read_counts
from ifvit.studies.quantities import Metric, SeedMean, mean_over_seeds
from ifvit.studies.study import StudyRun, arm_recipes, list_runs
from ifvit.training.config import TrainConfig

_FREE = {
    *("run", "branch", "shards", "cache", "vae", "text_encoder", "engine", "sample_grid"),
    *("micro_batch_size", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("keep_every", "keep_best", "export_every", "keep_exports", "resume", "tolerate_nonfinite"),
    *("trackers", "profile", "validation"),
}
"""Fields of a recipe that a run may set in another way than the study file: they are places, or do
not change what the run learns."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of one recipe by seed; `colour` is an index of COLOURS."""

    name: str
    colour: int
    runs: Mapping[int, Run]


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
                    samples = samples_of(run, row) if row else []
                    found[arm.name][seed] = Evaluation(row=row, samples=samples, counts=counts)
        return found


def series_of(row: MetricsRow) -> Series:
    """Return the series that a row belongs to."""
    return Series(row.protocol.name, row.protocol.guidance_scale)


def samples_folder(run: Run, row: MetricsRow) -> str:
    """URL of the folder of the samples behind a row."""
    protocol = row.protocol
    evaluations = storage.join(run.url, FOLDER)
    return samples_url(row_url(evaluations, protocol.name, protocol.guidance_scale, row.step))


def samples_of(run: Run, row: MetricsRow) -> list[SampleRow]:
    """Read the samples behind a row; [] if there are none."""
    return run.samples if row is run.last else read_samples(samples_folder(run, row))


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A caption, the URL of its real image, and by arm the URL of the image generated for it.

    None stands for an image that is missing. `marks` say by arm what is right about a scene.
    """

    caption: str
    real: str | None
    images: Mapping[str, str | None]
    marks: Mapping[str, Mapping[str, bool]]


def caption_rows(selection: Selection, count: int) -> list[Captioned]:
    """Return the first captions of the main series with the images of the first shared seed.

    An arm without this seed shows its own first seed. Raises UserError for a link out of a run.
    """
    shown = {arm.name: _first_shared(selection, arm) for arm in selection.arms}
    listed = {
        name: {(s.image_id, s.prompt): s for s in samples_of(*found)}
        for name, found in shown.items()
        if found
    }
    rows = []
    for key in list(dict.fromkeys(key for samples in listed.values() for key in samples))[:count]:
        own = {name: samples[key] for name, samples in listed.items() if key in samples}
        reals = (_image(shown[name], sample.real) for name, sample in own.items() if sample.real)
        scores = {name: sample.scores or {} for name, sample in own.items()}
        rows.append(
            Captioned(
                caption=shorten(key[1], 1000),
                real=next(filter(None, reals), None),
                images={
                    name: _image(shown[name], own[name].file) if name in own else None
                    for name in listed
                },
                marks={
                    name: {aspect: value for aspect, value in found.items() if value is not None}
                    for name, found in scores.items()
                },
            )
        )
    return rows


def _first_shared(selection: Selection, arm: Arm) -> tuple[Run, MetricsRow] | None:
    """Return the run and row of the first seed that was evaluated for all arms."""
    if not selection.series:
        return None
    main = selection.series[0]
    found = {  # every selected series has a row, so some arm has one
        one.name: {
            seed: row for seed, run in one.runs.items() if (row := selection.last(run, main))
        }
        for one in selection.arms
    }
    shared = set.intersection(*(set(rows) for rows in found.values() if rows))
    seeds = sorted(shared & found[arm.name].keys()) or sorted(found[arm.name])
    return (arm.runs[seeds[0]], found[arm.name][seeds[0]]) if seeds else None


def _image(shown: tuple[Run, MetricsRow] | None, file: str) -> str | None:
    """Return the URL of a file of samples; None without it."""
    assert shown
    run, row = shown
    url = storage.join(samples_folder(run, row), file)
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


def explained_keys(planned: Sequence[StudyRun]) -> frozenset[str]:
    """Return the keys of recipes that differ between the runs of a study."""
    recipes = [_flatten_recipe(run.recipe) for run in planned]
    return frozenset(
        key for key in recipes[0] if any(r.get(key) != recipes[0][key] for r in recipes)
    )


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
    counts, excluded_counts = read_counts(runs)
    selection = Selection(
        arms=arms,
        series=order,
        rows=rows,
        counts=counts,
        excluded=[*excluded, *excluded_counts],
        at_end=at_end,
    )
    missing = [
        f"{run.name} has no evaluation {order[0]} that can be compared"
        + (f" at its last step, {run.end.step:,}." if at_end and run.end else ".")
        for run in runs
        if order and not selection.last(run, order[0])
    ]
    return replace(selection, excluded=[*selection.excluded, *missing])


def _without_scale(protocol: Protocol) -> Protocol:
    return replace(protocol, sampling=protocol.sampling | {"guidance_scale": 0.0})


def _usual_protocols(protocols: Sequence[Protocol]) -> dict[str, Protocol]:
    """Protocol name => the most frequent protocol without its scale; the first of equal ones."""
    usual: dict[str, Protocol] = {}
    for name in dict.fromkeys(protocol.name for protocol in protocols):
        groups: list[list[Protocol]] = []
        for protocol in map(_without_scale, (p for p in protocols if p.name == name)):
            group = next((g for g in groups if not differences(g[0], protocol)), None)
            if group is None:
                groups.append([protocol])
            else:
                group.append(protocol)
        usual[name] = max(groups, key=len)[0]
    return usual


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
