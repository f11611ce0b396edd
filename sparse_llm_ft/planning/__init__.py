"""What a run will need, before it starts: batch sizes, and the forecast of memory and work of each phase."""
