"""Data, objective, optimizer, loop and state of a training run; knows no host."""
