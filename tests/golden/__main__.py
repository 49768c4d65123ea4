"""Writes the checkpoints of a new format: ``python -m tests.golden format-2``.

To be run once for each format that is released, at the lowest versions of what the
package requires, since every later one must read them. What is there is never replaced.
"""

import json
import sys

import movement_jax as mj

from . import states


def main(release: str) -> None:
    """Writes every state and notes its digest."""
    (states.HERE / release).mkdir()
    digests = json.loads(states.DIGESTS.read_text()) if states.DIGESTS.exists() else {}
    for name in states.MADE:
        directory, state = states.HERE / release / name, states.trained(name)
        mj.checkpoint.save(directory, 12, state)
        (directory / ".movement_jax.lock").unlink()
        digests[f"{release}/{name}"] = states.digest(state)
    states.DIGESTS.write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
