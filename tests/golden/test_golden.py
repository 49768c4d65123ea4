import json

import jax.numpy as jnp
import pytest

import movement_jax as mj

from . import states

DIGESTS = json.loads(states.DIGESTS.read_text())


@pytest.mark.parametrize("name", DIGESTS)
def test_checkpoints_of_every_format_load_bit_for_bit(name):
    directory = states.HERE / name
    restored = mj.checkpoint.restore(directory, like=states.fresh(directory.name))
    assert states.digest(restored) == DIGESTS[name]
    assert list(mj.checkpoint.verify(directory)) == [12]
    pruning = mj.find_state(restored["train"].opt_state)
    assert pruning.step == 12
    assert mj.sparsity_of(pruning) > 0.6
    assert jnp.any(restored["train"].params["scan"]["kernel"] != 0)


def test_all_of_the_last_format_are_there():
    folders = sorted(path.name for path in states.HERE.glob("format-*"))
    kept = [f"{folders[-1]}/{name}" for name in states.MADE]
    assert set(kept) <= set(DIGESTS)


@pytest.mark.parametrize("other", ["movement", "soft"])
def test_and_only_into_what_was_saved(other):
    directory = states.HERE / "format-1" / "chained"
    with pytest.raises(mj.CheckpointError, match="does not fit `like`: leaf"):
        mj.checkpoint.restore(directory, like=states.fresh(other))
