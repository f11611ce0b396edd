"""The report: pictures of runs, drawn from their folders alone. The import loads neither torch nor matplotlib."""

from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.page import is_live, write_report

__all__ = ["RunReport", "is_live", "write_report"]
