"""Pictures of runs, made from their folders alone. Importing it loads neither torch nor matplotlib."""

from sparse_llm_ft.report.data import RunReport
from sparse_llm_ft.report.page import write_report

__all__ = ["RunReport", "write_report"]
