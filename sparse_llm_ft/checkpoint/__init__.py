"""`TrainState` as files: its format, what makes one valid, and a run's store of them."""
