"""What a study found; read by the report, the admin's page and the paper's sheet."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ifvit.rating.counting import CountingResults, summarise_counting
from ifvit.rating.preference import PreferenceResults, summarise_preference
from ifvit.rating.store import Answer, Store
from ifvit.rating.study import Study, read_study


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a rater is; `last` is the time of the newest answer, UTC."""

    rater: int
    done: int
    total: int
    last: str | None


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All of a study. None: no such question has been answered yet."""

    models: list[str]
    progress: list[Progress]
    preference: PreferenceResults | None
    counting: CountingResults | None


def read_results(folder: str) -> StudyResults:
    """The results of the answers so far. Raises UserError when there is no study in `folder`."""
    study = read_study(folder)
    store = Store(study.folder)
    try:
        return summarise(study, store)
    finally:
        store.close()


def summarise(study: Study, store: Store) -> StudyResults:
    """The results of the answers that `store` has now."""
    answers = store.answers()
    return StudyResults(
        models=[model.name for model in study.models],
        progress=_progress(study, store, answers),
        preference=summarise_preference(study, answers),
        counting=summarise_counting(study, answers),
    )


def _progress(study: Study, store: Store, answers: Sequence[Answer]) -> list[Progress]:
    done = Counter(answer.rater for answer in answers)
    last = {answer.rater: answer.answered_at for answer in answers}
    total = len(study.tasks(rater=0))
    return [
        Progress(rater=rater.id, done=done[rater.id], total=total, last=last.get(rater.id))
        for rater in store.raters()
    ]
