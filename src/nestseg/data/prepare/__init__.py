"""Preparing the data sets from their official archives."""

from nestseg.data.prepare.prepare import Prepared, format_prepared, prepare_dataset

__all__ = ["Prepared", "format_prepared", "prepare_dataset"]
