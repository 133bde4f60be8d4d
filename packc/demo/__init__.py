"""``python -m packc demo``: an unmodified Mamba trained on text of very different lengths, packed and not."""
