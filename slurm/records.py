"""What a run directory knows of its jobs: RUN/jobs/SUBMISSION.json, and .diff beside it."""

from dataclasses import asdict, dataclass

from ifvit import storage
from ifvit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One job of a submission."""

    job_id: str
    """`123`, or `123_4` in an array."""
    verb: str
    run: str
    """Folder in which its progress shows: a run, or a dataset."""


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord:
    """One call of `ifvit submit`; enough to find its jobs from another machine, days later."""

    submitted: str
    """UTC, ISO 8601."""
    command: list[str]
    """What was typed."""
    commit: str
    """Commit of the code; empty when it was no git checkout."""
    folder: str
    """Shared folder with the code, job files and logs; its name is the submission's."""
    executor: str
    jobs: list[JobRecord]


def write_record(home: str, record: SubmissionRecord, diff: str) -> None:
    """Write, or write again with more jobs, a submission into the run directory `home`."""
    name = storage.join(home, "jobs", record.folder.rsplit("/", 1)[-1])
    storage.write_json(f"{name}.json", asdict(record))
    if diff:
        storage.write_bytes(f"{name}.diff", diff.encode())


def read_records(home: str) -> list[SubmissionRecord]:
    """All submissions of a run directory, oldest first; raises UserError when there are none."""
    names = storage.list_names(storage.join(home, "jobs"))
    files = [storage.join(home, "jobs", name) for name in names if name.endswith(".json")]
    if not files:
        raise UserError(f"{home}/jobs: no jobs; give the run that `ifvit submit` was given")
    return [_parse(storage.read_json(file)) for file in files]


def _parse(fields: dict[str, object]) -> SubmissionRecord:
    jobs = [JobRecord(**job) for job in fields.pop("jobs")]  # type: ignore[attr-defined]
    return SubmissionRecord(jobs=jobs, **fields)  # type: ignore[arg-type]
