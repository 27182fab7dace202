"""Arms are compared in pairs of seeds and captions, and claims are tested by the one rule."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from made_counts import made_row
from made_runs import build_row, estimate
from scipy.stats import t as student

from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate
from ifvit.sampling.samples import SampleRow
from ifvit.studies.comparisons import (
    Arms,
    Comparison,
    Evaluation,
    Question,
    compare,
    evaluate_claims,
    questions_about,
)
from ifvit.studies.config import Claim
from ifvit.studies.quantities import (
    COUNT,
    COUNT_ERROR,
    FID,
    FRECHET,
    HELD_OUT_LOSS,
    MATCH_RATIO,
    METRIC_OF,
    RETRIEVAL,
    mean_over_seeds,
)
from ifvit.studies.statistics import holm

NOISE = [0.010, -0.004, 0.007, -0.011, 0.002, -0.008, 0.005, -0.001]
"""Effects of eight seeds that all arms share."""
OWN = [0.001, -0.002, 0.002, 0.000, -0.001, 0.001, -0.001, 0.000]
"""Noise of one arm alone."""


def made(*values: float) -> list[Estimate]:
    return [estimate(value, 0.1) for value in values]


def arm(retrieval: Sequence[float], **changes: Any) -> dict[int, Evaluation]:
    row = build_row(0.0, **changes)
    return {
        seed: Evaluation(row=dataclasses.replace(row, retrieval_at_16=estimate(value)))
        for seed, value in enumerate(retrieval)
    }


def shifted(shift: float, num_seeds: int = 8, sign: int = 1) -> list[float]:
    pairs = zip(NOISE[:num_seeds], OWN, strict=False)
    return [0.5 + shift + noise + sign * own for noise, own in pairs]


def answer(arms: Arms, question: Question) -> Comparison:
    (found,) = compare(arms, [question])
    return found


def test_an_estimate_over_seeds_has_students_interval() -> None:
    several, one = mean_over_seeds(made(1.0, 2.0, 4.0)), mean_over_seeds(made(2.0))
    error = np.std((1.0, 2.0, 4.0), ddof=1) / math.sqrt(3)
    assert (several.low, several.high) == pytest.approx(student.interval(0.95, 2, 7 / 3, error))
    assert several.error == pytest.approx(error)
    assert one.seed_error is None
    assert (one.error, several.sample_error) == pytest.approx((0.1, 0.1))


def test_pairing_finds_a_difference_that_is_smaller_than_the_noise_of_seeds() -> None:
    arms = {"base": arm(shifted(0.0)), "new": arm(shifted(0.005, sign=-1))}
    found = answer(arms, Question(RETRIEVAL, "new", "base"))
    assert found.outcome == "better"
    assert found.difference.mean == pytest.approx(0.005)
    assert found.difference.correlation is not None
    assert found.difference.correlation > 0.8
    assert answer(arms, Question(RETRIEVAL, "base", "new")).outcome == "worse"
    assert found.sentence.startswith("+0.5 points [+0.3, +0.7] over 8 paired seeds, p = 0.0")
    assert found.sentence.endswith(" after Holm: better")


def test_changes_have_a_sign_and_shares_change_by_points() -> None:
    changes = [RETRIEVAL.show_change(value) for value in (0.041, -0.2, -0.0001)]
    assert changes == ["+4.1 points", "-20.0 points", "+0.0 points"]
    assert FID.show_change(-0.125) == "-0.12"


def test_a_question_is_answered_over_the_seeds_that_both_arms_have() -> None:
    base, new = arm(shifted(0.0)), arm(shifted(0.1, sign=-1))
    new[3] = Evaluation(row=None)
    del base[5]
    found = answer({"base": base, "new": new}, Question(RETRIEVAL, "new", "base"))
    assert found.difference.seeds == (0, 1, 2, 4, 6, 7)


def test_losses_of_different_targets_are_never_compared() -> None:
    def loss(target: str) -> dict[int, Evaluation]:
        row = dataclasses.replace(build_row(0.5), held_out_loss=estimate(0.5), target=target)
        return {1: Evaluation(row=row)}

    arms = {"base": loss("epsilon"), "flow": loss("flow"), "other": loss("epsilon")}
    found = compare(arms, questions_about(arms, "base", [HELD_OUT_LOSS]))
    assert [one.question.arm for one in found] == ["other"]


def test_captions_are_paired_inside_each_seed() -> None:
    draw = np.random.default_rng(0)
    difficulty = draw.normal(0.5, 0.3, 400)

    def made_arm(gain: float) -> dict[int, Evaluation]:
        evaluations = {}
        for seed in (1, 2):
            losses = difficulty + gain + draw.normal(0, 0.02, 400)
            samples = [
                SampleRow(file=f"{n:05d}.png", prompt="", position=n, held_out_loss=float(loss))
                for n, loss in enumerate(losses)
            ]
            mean = estimate(float(losses.mean()), 0.3 / math.sqrt(400))
            row = dataclasses.replace(build_row(0.5), held_out_loss=mean, target="epsilon")
            evaluations[seed] = Evaluation(row=row, samples=samples)
        return evaluations

    arms = {"base": made_arm(0.0), "new": made_arm(-0.01)}
    question = Question(HELD_OUT_LOSS, "new", "base")
    found = answer(arms, question)
    assert found.captions_are_paired
    assert found.difference.caption_error == pytest.approx(0.02 / math.sqrt(400), rel=0.15)
    one_seed = {name: {1: evaluations[1]} for name, evaluations in arms.items()}
    single = answer(one_seed, question)
    assert single.outcome == "open"
    assert single.difference.high is not None
    assert single.difference.high < 0
    assert single.sentence.startswith("one run each: -0.0")
    assert "over captions; one seed does not tell recipes apart" in single.sentence
    without = {name: {1: Evaluation(row=e[1].row)} for name, e in arms.items()}
    unpaired = answer(without, question)
    assert not unpaired.captions_are_paired
    assert unpaired.difference.caption_error == pytest.approx(0.3 * math.sqrt(2 / 400))


def test_scene_aspects_have_values_per_caption() -> None:
    aspects = {"count": True, "colour": True, "kind": False, "relation": None}
    samples = [
        SampleRow(file="a.png", prompt="", position=0, scores=aspects),
        SampleRow(file="b.png", prompt="", position=1, scores=dict.fromkeys(aspects, True)),
    ]
    evaluation = Evaluation(row=build_row(0.5), samples=samples)
    found = {field: evaluation.by_caption(metric) for field, metric in METRIC_OF.items()}
    assert {field: values for field, values in found.items() if values} == {
        "count_accuracy": {"a.png": 1.0, "b.png": 1.0},
        "colour_accuracy": {"a.png": 1.0, "b.png": 1.0},
        "kind_accuracy": {"a.png": 0.0, "b.png": 1.0},
        "relation_accuracy": {"b.png": 1.0},
        "scene_accuracy": {"a.png": 0.0, "b.png": 1.0},
    }


def test_object_counts_are_compared_like_metrics() -> None:
    def counted(*errors: tuple[int, int]) -> dict[int, Evaluation]:
        return {
            seed: Evaluation(row=None, counts=made_row(pair)) for seed, pair in enumerate(errors)
        }

    arms = {"base": counted((2, 2), (2, 1), (2, 2)), "new": counted((0, 1), (0, 0), (1, 0))}
    error, match = compare(arms, questions_about(arms, "base", [COUNT_ERROR, MATCH_RATIO]))
    assert error.difference.values == (-1.5, -1.5, -1.5)
    assert error.outcome == "open", "differences that agree exactly decide nothing"
    assert "without spread there is no test" in error.sentence
    assert match.difference.values == (0.5, 1.0, 0.5)
    assert error.captions_are_paired
    assert match.captions_are_paired


def test_questions_of_one_call_are_one_family() -> None:
    arms = {"base": arm(shifted(0.0)), "a": arm(shifted(0.002, sign=-1)), "b": arm(shifted(0.0))}
    arms["b"][0] = Evaluation(row=build_row(0.6))
    alone = answer(arms, Question(RETRIEVAL, "a", "base"))
    both = compare(arms, questions_about(arms, "base", [RETRIEVAL, FRECHET]))
    p_values = [one.difference.p_value for one in both]
    assert [one.adjusted_p for one in both] == holm(p_values)
    assert p_values.count(None) == 2, "the distance is the same in all runs"
    assert alone.adjusted_p is not None
    assert both[0].adjusted_p == pytest.approx(2 * alone.adjusted_p)
    assert both[1].outcome == "open"
    assert both[1].more_seeds is not None
    assert f"about {both[1].more_seeds} more seeds would decide it" in both[1].sentence


def claim(arm_name: str, *against: str, **metrics: Any) -> Claim:
    return Claim(text="made up", arm=arm_name, against=against, metrics=metrics)


def verdicts(arms: Mapping[str, Mapping[int, Evaluation]], *claims: Claim) -> list[str]:
    return [result.verdict for result in evaluate_claims(arms, claims)]


def test_claims_are_confirmed_refuted_or_open() -> None:
    arms = {
        "early": arm(shifted(0.0)),
        "middle": arm(shifted(0.02, sign=-1)),
        "late": arm(shifted(0.04)[:4] + shifted(-0.04)[4:]),
        "untrained": {},
    }
    assert verdicts(
        arms,
        claim("middle", "early", retrieval_at_16="better"),
        claim("middle", "early", retrieval_at_16="worse"),
        claim("late", "early", retrieval_at_16="better"),
        claim("middle", "early", "late", retrieval_at_16="better"),
        claim("middle", "early", retrieval_at_16="better", fid="better"),
        claim("middle", "early", retrieval_at_16="worse", fid="better"),
        claim("untrained", "early", retrieval_at_16="better"),
        claim("middle", "early", fid="better"),
    ) == [
        *("confirmed", "refuted", "open", "open", "open", "refuted"),
        *("not measured", "not measured"),
    ]
    (half,) = evaluate_claims(
        arms, [claim("middle", "early", retrieval_at_16="better", fid="worse")]
    )
    assert [one.metric for one in half.comparisons] == [RETRIEVAL]
    assert half.missing == [Question(FID, "middle", "early")]


@pytest.mark.parametrize(
    ("against", "metrics"), [((), {"fid": "better"}), (("new",), {}), (("new",), {"fib": "better"})]
)
def test_a_claim_that_cannot_be_tested_is_a_user_error(
    against: tuple[str, ...], metrics: dict[str, Any]
) -> None:
    assert claim("new", "base", **dict.fromkeys(METRIC_OF, "better")).metrics
    with pytest.raises(UserError, match=r"made up: (give against|no metric fib; .*fid)"):
        claim("new", *against, **metrics)


def test_claims_are_one_family_and_shared_questions_count_once() -> None:
    arms = {"early": arm(shifted(0.0)), "middle": arm(shifted(0.005, sign=-1))}
    asked = claim("middle", "early", retrieval_at_16="better")
    alone, twice = (evaluate_claims(arms, [asked] * count)[0] for count in (1, 2))
    assert alone.comparisons == twice.comparisons


def test_a_claim_of_one_seed_stays_open_however_large_the_difference() -> None:
    arms = {"early": arm([0.1]), "middle": arm([0.9])}
    assert verdicts(arms, claim("middle", "early", retrieval_at_16="better")) == ["open"]
    assert answer(arms, Question(COUNT, "middle", "early")).difference.mean == 0
