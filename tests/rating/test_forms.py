"""Whatever is sent, only an answer to the question becomes one."""

import pytest

from ifvit.rating.forms import FormError, read_form
from ifvit.rating.study import Item, Kind, Task


def task(kind: Kind) -> Task:
    names = ("M2", "M1", "M3") if kind == "preference" else ("M1",)
    images = {name: f"{name}.png" for name in names}
    item = Item(number=7, kind=kind, prompt="p", position=0, images=images)
    return Task(item=item, repetition=1, shown=names)


def test_an_answer_names_models_rather_than_places() -> None:
    answer = read_form({"ranking": "2,0,1"}, task("preference"), rater=4)
    assert answer.value == ("M3", "M2", "M1")
    assert (answer.rater, answer.item, answer.repetition) == (4, 7, 1)
    assert answer.shown == ("M2", "M1", "M3")
    assert read_form({"count": "12"}, task("counting"), rater=4).value == 12


def test_a_skip_has_a_reason_and_no_value() -> None:
    answer = read_form({"skip_reason": "too close to call"}, task("preference"), rater=4)
    assert (answer.value, answer.skip_reason) == (None, "too close to call")
    assert read_form({"skip_reason": "cannot tell"}, task("counting"), rater=4).value is None


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("preference", {}),
        ("preference", {"ranking": ""}),
        ("preference", {"ranking": "0,1"}),
        ("preference", {"ranking": "0,1,1"}),
        ("preference", {"ranking": "0,1,2,2"}),
        ("preference", {"ranking": "0,1,3"}),
        ("preference", {"ranking": "0, 1,2"}),
        ("preference", {"ranking": "-1,0,1"}),
        ("preference", {"count": "1"}),
        ("preference", {"ranking": "0,1,2", "skip_reason": "other"}),
        ("preference", {"ranking": "0,1,2", "rater": "1"}),
        ("preference", {"skip_reason": "cannot tell"}),
        ("preference", {"skip_reason": ""}),
        ("counting", {"count": ""}),
        ("counting", {"count": "-1"}),
        ("counting", {"count": "100"}),
        ("counting", {"count": "1.5"}),
        ("counting", {"count": "1e1"}),
        ("counting", {"count": "٣"}),
        ("counting", {"ranking": "0"}),
        ("counting", {"skip_reason": "too close to call"}),
    ],
)
def test_anything_else_is_refused(kind: Kind, form: dict[str, str]) -> None:
    with pytest.raises(FormError):
        read_form(form, task(kind), rater=4)
