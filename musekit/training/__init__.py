"""The training floor: configuration, optimizer, EMA, the trainer and its callbacks."""
