"""What the core says plainly, computed faster: the core does without it."""
