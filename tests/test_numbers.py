"""Every number of every configuration is accepted or refused in one line that names its field."""

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.models.presets import CLASS_PRESETS, PRESETS
from ifvit.records import field_hints
from ifvit.verbs import VERBS, load

REQUIRED: dict[str, dict[str, Any]] = {
    "GenerateConfig": {"prompt": "a cat"},
    "EvaluateConfig": {"shards": "x"},
    "EvaluationSettings": {"shards": "x"},
    "SubmitEvaluateConfig": {"shards": "x"},
    "AttentionSettings": {"shards": "x"},
    "AttentionConfig": {"shards": "x"},
    **{f"{verb}Config": {"arms": {"x": {}}} for verb in ("StudyReport", "StudyRun", "SubmitStudy")},
    "ObjectiveConfig": {"timesteps": "logit_normal"},
    **{
        type(preset).__name__: vars(preset) for preset in (*CLASS_PRESETS.values(), PRESETS["tiny"])
    },
}
"""Values that a class needs although their fields have defaults."""


def members(hint: Any) -> Iterator[Any]:
    """The types in an annotation: those of a union, a container or below a rule."""
    if get_origin(hint) is Annotated:
        yield from members(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType, list, tuple, dict):
        for argument in get_args(hint):
            yield from members(argument)
    else:
        yield hint


def find_classes(cls: Any, found: dict[str, Any]) -> None:
    """Add a configuration class and those that its fields hold to `found`."""
    if cls.__name__ not in found:
        found[cls.__name__] = cls
        for hint in field_hints(cls).values():
            for member in filter(dataclasses.is_dataclass, members(hint)):
                find_classes(member, found)


CLASSES: dict[str, Any] = {}
for verb in VERBS.values():
    find_classes(load(verb.config), CLASSES)


def number_fields(cls: Any) -> list[str]:
    return [name for name, hint in field_hints(cls).items() if {int, float} & {*members(hint)}]


def build(cls: Any, **given: Any) -> Any:
    """Build a configuration from the given values and the least that its class requires."""
    hints = field_hints(cls)
    values = dict(REQUIRED.get(cls.__name__, {}))
    for field in dataclasses.fields(cls):
        has_default = {field.default, field.default_factory} != {dataclasses.MISSING}
        if field.init and not has_default and field.name not in values:
            values[field.name] = example(hints[field.name])
    return cls(**values | given)


def example(hint: Any) -> Any:
    """A valid value of an annotation."""
    if get_origin(hint) in (list, tuple):
        return get_origin(hint)([example(get_args(hint)[0])])
    if get_origin(hint) is dict:
        return {"x": example(get_args(hint)[1])}
    first = next(members(hint))
    if dataclasses.is_dataclass(first):
        return next((p for p in PRESETS.values() if isinstance(p, first)), None) or build(first)
    if get_origin(first) is Literal:
        return get_args(first)[0]
    return {int: 2, float: 0.5, str: "x"}[first]


def wrap(hint: Any, value: object) -> object:
    """`value` as an annotation holds it: itself, or in a list or tuple of the right length."""
    for arm in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(arm) is Annotated:
            return wrap(get_args(arm)[0], value)
        if get_origin(arm) is dict:
            return {"x": wrap(get_args(arm)[1], value)}
        if get_origin(arm) in (list, tuple):
            args = get_args(arm)
            size = len(args) if get_origin(arm) is tuple and args[-1] is not Ellipsis else 1
            return get_origin(arm)((value,) * size)
    return value


def is_inherited(cls: Any, field: str) -> bool:
    """Whether another configuration class of the verbs has the field, and this one inherits it."""
    return any(
        base.__name__ in CLASSES and field in field_hints(base)
        for base in cls.__mro__[1:]
        if dataclasses.is_dataclass(base)
    )


CASES = [
    (name, field)
    for name, cls in sorted(CLASSES.items())
    for field in number_fields(cls)
    if not is_inherited(cls, field)
]
MAY_BE_NEGATIVE = {
    "CreateConfig": "seed",
    "DateConfig": "clip_weight image_reward_weight",
    "EvaluationSettings": "guidance_scales",
    "ObjectiveConfig": "logit_mean",
    "Published": "values",
    "SamplingConfig": "guidance_scale seed",
    "StudyReportConfig": "seeds",
    "StudyRunConfig": "seeds",
    "SubmitStudyConfig": "seeds",
    "TrainConfig": "seed",
}
"""Class => fields that accept -1."""
MAY_BE_ZERO = {
    "AttentionSettings": "trim",
    "CaptionConfig": "dropout weight",
    "ClusterConfig": "exit_wait_s gpus_per_node signal_delay_s",
    "CreateConfig": "repeat_share seed",
    "DateConfig": "evaluations image_reward_weight radius",
    "EncodeConfig": "task tolerate",
    "EvaluateConfig": "task",
    "EvaluationSettings": "guidance_scales steps",
    "FusionTransformerConfig": "num_registers num_text_blocks timestep_offset",
    "ImportConfig": "ema_decay step",
    "KnockoutSettings": "num_images",
    "LogsConfig": "lines task",
    "ObjectCountConfig": "threshold",
    "ObjectiveConfig": "logit_mean",
    "OptimConfig": "betas cooldown_steps learning_rate warmup_steps weight_decay",
    "Published": "values",
    "RegulationConfig": "blocks share_of_steps",
    "SampleGridConfig": "every guidance_scale",
    "SamplingConfig": "guidance_high guidance_low guidance_scale seed",
    "ScenesConfig": "seed",
    "ServeConfig": "port",
    "StudyReportConfig": "seeds",
    "StudyRunConfig": "seeds",
    "SubmitStudyConfig": "seeds",
    "TextOptions": "state",
    "TrainConfig": "caption_dropout ema_decays keep_every seed tolerate_nonfinite",
}
"""Class => fields that accept 0."""


def refusal(name: str, field: str, value: float) -> str | None:
    """The error of a class that is built with the value; None if it accepts the value."""
    cls = CLASSES[name]
    try:
        build(cls, **{field: wrap(field_hints(cls)[field], value)})
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("name", "field"), CASES, ids=map(".".join, CASES))
def test_a_number_is_finite_and_a_refusal_names_its_field(name: str, field: str) -> None:
    errors = [refusal(name, field, value) for value in (math.nan, math.inf, -math.inf, 10**30)]
    assert None not in errors
    zero, negative = refusal(name, field, 0), refusal(name, field, -1)
    assert (negative is None) == (field in MAY_BE_NEGATIVE.get(name, "").split())
    assert (zero is None) == (field in MAY_BE_ZERO.get(name, "").split())
    for error in (*errors, zero, negative):
        assert error is None or (field in error and error.isprintable() and len(error) < 300)


@pytest.mark.parametrize(("name", "field"), CASES, ids=map(".".join, CASES))
def test_a_word_in_place_of_a_number_is_named(name: str, field: str) -> None:
    word = wrap(field_hints(CLASSES[name])[field], "x")
    word = word if isinstance(word, str) else f"[{', '.join(word)}]"
    with pytest.raises(UserError, match=rf"^verb: {field} is .*x.*; expected") as raised:
        read_config(CLASSES[name], [f"--{field}", word], prog="verb")
    assert len(str(raised.value)) < 300
