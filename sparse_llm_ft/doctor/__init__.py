"""What a machine lacks for a run: one finding for each part that a run would use."""
