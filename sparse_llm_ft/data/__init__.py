"""Data from files or the hub to batches."""
