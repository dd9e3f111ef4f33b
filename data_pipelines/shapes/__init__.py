"""A tiny generated set: coloured shapes with names in five languages, for tests."""
