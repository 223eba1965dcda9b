"""Task directories to batches."""
