"""What a run shows and writes: metrics, progress, where the time went, profiles."""
