"""What everything else stands on: weights, trees of them, sharding, checkpoints, files."""
