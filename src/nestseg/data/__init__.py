"""Data sets in their official layouts, transforms, and the loader."""
