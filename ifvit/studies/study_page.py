"""The verbs `report` and `study report`: runs => one page that compares their arms.

`study report` shows the arms of a study, each with its runs by seed; `report` shows any runs, each
as an arm of its own. Both read files only and compute no metric anew: runs become arms (`arms`),
arms are compared (`comparisons`), and tables and figures show arms and comparisons (`study_tables`,
`study_figures`) on the page, and as files of the study.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import yaml

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.runs import Run, read_runs
from ifvit.images import ImageError
from ifvit.models.presets import setting_of
from ifvit.studies import study_figures as figures
from ifvit.studies import study_tables as tables
from ifvit.studies.arms import (
    Arm,
    Captioned,
    Selection,
    Series,
    as_arms,
    caption_rows,
    means_of,
    plan_runs,
    read_arms,
    select,
)
from ifvit.studies.comparisons import (
    Arms,
    ClaimResult,
    Comparison,
    compare,
    evaluate_claims,
    questions_about,
)
from ifvit.studies.config import Claim, Published, ReportConfig, StudyConfig, StudyReportConfig
from ifvit.studies.page import PageFigure, Table, inline_image, render_page
from ifvit.studies.quantities import FID, FRECHET, MAIN_METRICS, METRIC_OF, METRICS, Metric

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_NUM_CAPTIONS = 24
_NUM_PICTURES = 240
"""Pictures of the caption grid; studies of many arms show fewer captions."""
_NUM_GRIDS = 6


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a page is about."""

    title: str
    arms: Sequence[Arm]
    baseline: str
    num_runs: int
    absent: Sequence[str] = ()
    """Sentences about runs that are not shown."""
    series: Sequence[Series] = ()
    """Evaluations that come first."""
    claims: Sequence[Claim] = ()
    published: Sequence[Published] = ()
    rating: str | None = None
    is_study: bool = False


def report(config: ReportConfig) -> None:
    """Write the page of any runs.

    Raises UserError if no run is given, a folder does not exist, or a file is broken.
    """
    if not config.runs:
        raise UserError("report: no runs given; name at least one run folder")
    arms = as_arms(read_runs(config.runs))
    title = " and ".join(arm.name for arm in arms) if len(arms) < 3 else f"{len(arms)} runs"
    page, _ = make_page(Subject(title=title, arms=arms, baseline=arms[0].name, num_runs=len(arms)))
    storage.write_bytes(config.output, page)
    sys.stdout.write(f"{config.output}\n")


def report_study(config: StudyReportConfig) -> None:
    """Write FOLDER/report: the page, each table as CSV, each figure as PNG and CSV, results.md.

    Raises UserError for a study file that contradicts itself, and for a broken file of a run.
    """
    planned = plan_runs(config)
    arms, absent = read_arms(config, planned)
    subject = Subject(
        title=config.title or config.folder.rstrip("/").rpartition("/")[2],
        arms=arms,
        baseline=config.reference_arm,
        num_runs=len(planned),
        absent=absent,
        series=_series_of(config),
        claims=config.claims,
        published=config.published,
        rating=config.rating,
        is_study=True,
    )
    page, files = make_page(subject)
    folder = storage.join(config.folder, "report")
    for name, data in {**files, "index.html": page}.items():
        storage.write_bytes(storage.join(folder, name), data)
    sys.stdout.write(f"{storage.join(folder, 'index.html')}\n")


def _series_of(config: StudyConfig) -> list[Series]:
    """Return the series of a study's evaluations, those of the protocol's own scale first."""
    found = []
    for settings in config.evaluate:
        own, name = settings.protocol.sampling.guidance_scale, settings.protocol.name
        scales = sorted(settings.guidance_scales or [own], key=lambda scale: scale != own)
        found += [Series(name, scale) for scale in scales]
    return found


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a page says about its subject."""

    subject: Subject
    selection: Selection
    main: Series | None
    """The evaluations that are compared; None if no run was evaluated."""
    evaluations: Arms
    metrics: Sequence[Metric]
    comparisons: Sequence[Comparison]
    claims: Sequence[ClaimResult]
    published: tables.PublishedNumbers
    captions: Sequence[Captioned]


def make_page(subject: Subject) -> tuple[bytes, dict[str, bytes]]:
    """Return the page, and the files of a study: those of its tables and figures by name."""
    found = find(subject)
    shown = {name: table for name, table in _make_tables(found).items() if table.lines}
    drawn = {n: one for n, one in _make_figures(found).items() if one.plots or one.picture}
    page = _render(found, shown, drawn)
    if not subject.is_study:
        return page, {}
    files = {f"{name}.csv": table.csv for name, table in shown.items()}
    files |= {f"{name}.csv": figure.csv for name, figure in drawn.items()}
    files |= {f"{name}.png": figure.png for name, figure in drawn.items()}
    text = "\n".join(table.markdown for table in shown.values())
    return page, files | {"results.md": text.encode()}


def find(subject: Subject) -> Findings:
    """Compare the arms of a subject."""
    selection = select(subject.arms, subject.series, at_end=subject.is_study)
    main = selection.series[0] if selection.series else None
    evaluations = selection.evaluations(main)
    metrics = _page_metrics(evaluations, subject.claims)
    rows = [one.row for seeds in evaluations.values() for one in seeds.values() if one.row]
    count = min(_NUM_CAPTIONS, _NUM_PICTURES // max(1, len(selection.arms)))
    return Findings(
        subject=subject,
        selection=selection,
        main=main,
        evaluations=evaluations,
        metrics=metrics,
        comparisons=compare(evaluations, questions_about(evaluations, subject.baseline, metrics)),
        claims=evaluate_claims(evaluations, subject.claims),
        published=tables.PublishedNumbers(subject.published, rows),
        captions=caption_rows(selection, evaluations, max(_NUM_CAPTIONS // 4, count)),
    )


def _page_metrics(evaluations: Arms, claims: Sequence[Claim]) -> list[Metric]:
    """Return the metrics that arms are compared in: the main ones, and those of the claims."""
    quality = FID if means_of(evaluations, FID) else FRECHET
    named = {field for claim in claims for field in claim.metrics}
    claimed = (metric for metric in METRIC_OF.values() if metric.field in named)
    wanted = dict.fromkeys((quality, *MAIN_METRICS, *claimed))
    return [metric for metric in wanted if means_of(evaluations, metric)]


def _make_tables(found: Findings) -> dict[str, Table]:
    """Return all tables by the names of their files."""
    arms, selection = found.subject.arms, found.selection
    others = {
        f"arms_{series.name}_w{series.scale:g}": tables.arms_table(
            f"Evaluations {series}", arms, selection.evaluations(series)
        )
        for series in selection.series[1:]
    }
    return {
        "arms": tables.arms_table(
            "Arms", arms, found.evaluations, found.comparisons, found.published
        ),
        "claims": tables.claims_table(found.claims),
        "differences": tables.differences_table(found.comparisons),
        "pairing": tables.pairing_table(found.comparisons),
        **others,
        "evaluations": tables.evaluations_table(selection),
        "protocol": tables.protocol_table(selection),
        "recipes": tables.recipes_table(arms),
    }


def _make_figures(found: Findings) -> dict[str, PageFigure]:
    """Return all figures by the names of their files."""
    arms, selection = found.subject.arms, found.selection
    colours = {arm.name: arm.colour for arm in arms}
    of_rows = [metric for metric in found.metrics if metric in METRICS]
    return {
        **figures.atlas_figures(selection, found.evaluations, found.metrics),
        "forest": figures.forest_figure(found.comparisons, colours),
        "captions": figures.captions_figure(found.captions),
        "steps": figures.steps_figure(selection, of_rows),
        "guidance": figures.guidance_figure(selection, of_rows),
        "training": figures.curves_figure(arms),
        "object_count": figures.counts_figure(selection),
        "preference": figures.rating_figure(_read_preference(found.subject.rating), colours),
        "attention": figures.attention_of(arms),
        "knockout": figures.knockout_of(arms),
    }


def _read_preference(folder: str | None) -> "PreferenceResults | None":
    if folder is None or not storage.exists(folder):
        return None
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"rating needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(folder).preference


_HOW_TO_MAKE = {
    "training": "Training curves: metrics.jsonl of a run",
    "captions": "Images and metrics: `ifvit evaluate --weights RUN`",
    "steps": "Metrics during training: `ifvit evaluate --weights RUN --steps all`",
    "guidance": "Quality under guidance: `ifvit evaluate --weights RUN --guidance_scales [1.5,3]`",
    "object_count": "Object count: `ifvit evaluate --weights RUN --protocol object_count`",
    "preference": "Human preference: `ifvit rate create STUDY`, and its folder in the study file",
    "attention": "Attention: `ifvit analyze attention RUN --shards HELD_OUT`",
    "knockout": "Knock-out: `ifvit analyze knockout RUN --shards HELD_OUT`",
}
"""Figure => what is missing without it, and the command that makes it."""


def _render(found: Findings, shown: Mapping[str, Table], drawn: Mapping[str, PageFigure]) -> bytes:
    subject, captions = found.subject, found.captions
    rows = found.selection.rows.values()
    return render_page(
        "report.html",
        **vars(found),
        title=subject.title,
        tables=shown,
        figures=drawn,
        atlas=[name for name in drawn if name.startswith("atlas_")],
        colours={arm.name: arm.colour for arm in subject.arms},
        inline=_inline,
        num_samples=next((r.protocol.num_samples for own in rows for r in own), 0),
        has_real=any(row.real for row in captions),
        shown_arms=[a for a in subject.arms if captions and a.name in captions[0].images],
        how_to_make=[text for name, text in _HOW_TO_MAKE.items() if name not in drawn],
        grids={run.name: _training_grids(run) for run in found.selection.runs[:_NUM_CAPTIONS]},
        setting_of=setting_of,
        dump=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    )


def _inline(url: str) -> str:
    """Return an image as a data URI. Raises UserError for what is not an image."""
    try:
        return inline_image(storage.read_bytes(url))
    except ImageError as error:
        raise UserError(f"{url}: {error}") from None


def _training_grids(run: Run) -> list[tuple[int, str]]:
    """Return (step, URL) of the first, the last and some grids between them."""
    grids = run.training_grids
    if len(grids) > _NUM_GRIDS:
        stride = (len(grids) - 1) / (_NUM_GRIDS - 1)
        grids = [grids[round(stride * number)] for number in range(_NUM_GRIDS)]
    return [(step, run.locate(url)) for step, url in grids]
