"""Every problem of a data set in one pass: broken files, pairs that are not whole, labels that are not class ids."""

from nestseg.data.verify.labels import LabelRule
from nestseg.data.verify.pairs import Split, collect_splits
from nestseg.data.verify.problems import KINDS, Problem
from nestseg.data.verify.report import Report, SplitSummary, format_report, write_report
from nestseg.data.verify.verify import verify_dataset, verify_named

__all__ = [
    "KINDS",
    "LabelRule",
    "Problem",
    "Report",
    "Split",
    "SplitSummary",
    "collect_splits",
    "format_report",
    "verify_dataset",
    "verify_named",
    "write_report",
]
