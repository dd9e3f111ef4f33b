"""Building blocks that know nothing of InternVL."""
