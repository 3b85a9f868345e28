"""What is done with models besides training them: talk, rank, judge, report."""
