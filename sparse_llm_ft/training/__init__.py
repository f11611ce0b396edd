"""Runs: preparation without torch, the phase runner, the loop, and the run folder."""
