"""One loop, one step, for every stage."""
