"""Trains: the run over its phases, the loop of a phase, callbacks, scores and records."""
