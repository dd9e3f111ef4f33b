"""Times the image path against other loaders; ``python -m data_pipelines.benchmark``."""
