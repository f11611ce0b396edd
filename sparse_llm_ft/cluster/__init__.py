"""Jobs on a cluster: the state that a run folder says, batch scripts, and what Slurm knows."""
