"""What brings users of other programs here: the original's launches and configurations, and others' data files."""
