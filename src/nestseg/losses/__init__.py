"""Training losses on low-resolution logits."""
