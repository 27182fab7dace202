"""The verb `report paper`: run folders => tables, figures and claims of arXiv 2403.16530."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.object_count import ObjectCountRow
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import read_runs
from ifvit.records import dump_csv
from ifvit.studies import paper_figures, paper_tables
from ifvit.studies.comparisons import (
    Comparison,
    Findings,
    Metric,
    SeedMean,
    compare,
    noise_between,
)
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import ERROR, MATCH, mean_score, read_counts
from ifvit.studies.page import inline_image, legend_of, render_page
from ifvit.studies.report import recipe_differences
from ifvit.studies.variants import PAPER_VARIANTS, VARIANT_COLOURS, Sheet, make_sheet, title_of

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.fusion", "backbone.num_text_blocks")


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, each table as CSV, and each figure as PNG and CSV.

    The page names missing data, and the runs that are left out. Raises UserError if no run is one
    of the paper's variants, for an unknown series, and for a broken file.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    sheet = make_sheet(read_runs(config.runs), config.series)
    paired = [v for v in PAPER_VARIANTS if v in sheet.variants] or list(sheet.variants)
    baseline, best = paired[0], paired[-1]
    counts, counts_excluded = read_counts(sheet.runs)
    counts_by_variant = {
        variant: found
        for variant, runs in sheet.variants.items()
        if (found := [counts[run.name] for run in runs if run.name in counts])
    }
    preference = _read_preference(config.study) if config.study else None
    tables = {
        "table1": paper_tables.table_1(sheet),
        "table1_further": paper_tables.table_further(sheet),
        "table2": paper_tables.table_2(sheet, {"baseline": baseline, "best": best}),
    }
    figures = {
        "figure3": paper_figures.figure_3(sheet),
        "figure4": paper_figures.figure_4(sheet, baseline, best),
        "figure5": paper_figures.figure_5(counts_by_variant, counts_excluded),
        "figure6": paper_figures.figure_6(preference),
        "figure7": paper_figures.figure_7(sheet),
        "figure8": paper_figures.figure_8(sheet),
    }
    files = {f"{name}.csv": dump_csv(table.records) for name, table in tables.items() if table}
    files |= {f"{name}.png": figure.png for name, figure in figures.items() if figure.png}
    files |= {f"{name}.csv": figure.csv for name, figure in figures.items() if figure.csv}
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    changed = [line.title for line in recipe_differences(sheet.runs)]
    files["paper.html"] = render_page(
        "paper.html",
        title="Intermediate fusion: the paper's tables and figures from our runs",
        sheet=sheet,
        baseline=title_of(baseline),
        best=title_of(best),
        variants=[
            {"name": title_of(v), "colour": VARIANT_COLOURS[v], "runs": [r.name for r in runs]}
            for v, runs in sheet.variants.items()
        ],
        missing_variants=[title_of(v) for v in PAPER_VARIANTS if v not in sheet.variants],
        devices=paper_tables.devices(sheet),
        protocol=[(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
        tables=tables,
        unlike=paper_tables.unlike_the_paper(sheet),
        claims=judge_claims(sheet, counts_by_variant, preference),
        figures=figures,
        inline_image=inline_image,
        legend_of=legend_of,
        differences=[name for name in changed if name not in _MAY_DIFFER],
    )
    for name, data in files.items():
        storage.write_bytes(storage.join(config.output, name), data)
    sys.stdout.write(f"{storage.join(config.output, 'paper.html')}\n")


def _read_preference(study: str) -> "PreferenceResults | None":
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"--study needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(study).preference


_CLAIMS = (
    (
        "concat_early",
        "concat_intermediate",
        "With concatenation, intermediate fusion has lower FID (5.77 against 5.98), higher CLIP "
        "Score (0.588 against 0.584) and counts better (18 of 20 pairs of object and count).",
    ),
    (
        "cross_attention_early",
        "cross_attention_intermediate",
        "With cross-attention, intermediate fusion has lower FID (5.68 against 6.48), higher CLIP "
        "Score (0.588 against 0.575) and counts better or as well (14 of 20 pairs).",
    ),
    (
        "concat_early",
        "cross_attention_intermediate",
        "Intermediate fusion by cross-attention is the best of the four variants; against the "
        "baseline: FID 5.68 and 5.98, CLIP Score 0.588 and 0.584.",
    ),
    (
        "cross_attention_early",
        "cross_attention_image_blocks_only",
        "Fusing in the middle blocks alone is the major source of the lower FID, and lowers the "
        "CLIP Score (Figure 7).",
    ),
    (
        "cross_attention_early",
        "cross_attention_text_branch_only",
        "The text branch alone is the major source of the higher CLIP Score (Figure 7).",
    ),
)
"""Two variants, and what the paper says about the second one beside the first."""


def judge_claims(
    sheet: Sheet,
    counts: Mapping[str, Sequence[ObjectCountRow]],
    preference: "PreferenceResults | None",
) -> list[Findings]:
    """Return each claim with our metrics, object counts, costs and win rates of both variants.

    Claims about which nothing was measured are left out.
    """
    claims = []
    for first, second, text in _CLAIMS:
        comparisons = [
            compare(metric, before, after)
            for metric in sheet.metrics
            if (before := sheet.mean(first, metric)) and (after := sheet.mean(second, metric))
        ]
        facts = _compare_costs(sheet, first, second)
        if first in counts and second in counts:
            found, fact = _compare_counts(counts[first], counts[second])
            comparisons, facts = comparisons + found, [*facts, fact]
        facts += [
            f"{rate.first} is ranked above {rate.second} in {rate.share.value:.0%} of "
            f"{rate.share.num_samples} rankings; the 95 % interval is {rate.share.low:.0%} to "
            f"{rate.share.high:.0%}."
            for rate in (preference.win_rates if preference else ())
            if {rate.first, rate.second} == {first, second}
        ]
        claims.append(Findings(title=text, comparisons=comparisons, facts=facts))
    return [claim for claim in claims if claim.comparisons or claim.facts]


def _compare_costs(sheet: Sheet, first: str, second: str) -> list[str]:
    """Compare GFLOPs and speed as ratios, which any hardware allows."""
    facts = []
    for metric, values in paper_tables.costs(sheet).items():
        before, after = values.get(first), values.get(second)
        if before and after:
            fact = f"{metric.title}: {after / before - 1:+.1%}"
            paper = paper_tables.PAPER_TABLE_1[metric]
            if second in paper:
                fact += f" (paper {paper[second] / paper[first] - 1:+.1%})"
            facts.append(f"{fact}.")
    return facts


def _compare_counts(
    first: Sequence[ObjectCountRow], second: Sequence[ObjectCountRow]
) -> tuple[list[Comparison], str]:
    """Compare error and match ratio over all images, then count pairs of object and asked count."""

    def means(metric: Metric, name: str | None, asked: int | None) -> list[SeedMean]:
        found = [mean_score(rows, metric, name, asked) for rows in (first, second)]
        return [mean for mean in found if mean]

    pairs = [means(ERROR, name, asked) for name, asked in first[0].group_sizes]
    gains = [before.value - after.value for before, after in pairs]
    clear = sum(gain > noise_between(*pair) for gain, pair in zip(gains, pairs, strict=True))
    fact = (
        f"Its average error is lower for {sum(gain > 0 for gain in gains)} of {len(pairs)} pairs "
        f"of object and count and equal for {gains.count(0.0)}; lower beyond the noise for {clear}."
    )
    return [compare(metric, *means(metric, None, None)) for metric in (ERROR, MATCH)], fact
