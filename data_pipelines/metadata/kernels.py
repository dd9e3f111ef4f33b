"""Arrow's functions on columns. They are made when it is imported, unseen by type checkers."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
