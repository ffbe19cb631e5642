"""Models at rest: files, what travels with the weights, model cards, the Hugging Face Hub."""
