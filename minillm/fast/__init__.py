"""What computes again, faster, what the core says plainly; the core does without."""
