"""The verb `study report`."""

from ifvit.studies.config import StudyReportConfig


def report_study(config: StudyReportConfig) -> None:
    """Write the page of a study."""
