"""From files or the hub to batches."""
