"""The effect of alignment, made visible: the same prompts through several models, side by side."""
