"""This process among the others: launchers, collectives, signals, dead ranks, exit status."""
