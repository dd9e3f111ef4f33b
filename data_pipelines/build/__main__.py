"""``python -m data_pipelines.build``."""

import sys

from data_pipelines.build.command import main

if __name__ == "__main__":
    sys.exit(main())
