"""minillm: from raw text to an aligned assistant, small enough to read."""
