"""Semantic segmentation around ResNeSt backbones."""

from nestseg.version import __version__

__all__ = ["__version__"]
