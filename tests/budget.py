"""How many examples property tests try: so many times what they ask for."""

import os

SCALE = int(os.environ.get("MOVEMENT_JAX_EXAMPLES", "1"))


def examples(n: int) -> int:
    """For `settings(max_examples=...)`."""
    return n * SCALE
