"""What is watched and kept of a training while it runs: its record, checkpoints, pace, and whether it collapses."""
