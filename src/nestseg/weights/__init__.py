"""Checkpoint layouts: one file a layout, and the safe reading of files."""
