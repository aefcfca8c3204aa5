"""How parameters change: the step, its state, the loop around it, signals, progress."""
