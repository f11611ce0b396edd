"""`TrainState` as files: its format, its validation, and a run's store of them."""
