"""From an image to labels: one path for every kind of model."""
