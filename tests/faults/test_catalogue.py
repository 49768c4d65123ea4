"""Every fault has a test of its name, or a reason to have none."""

from .catalogue import FAULTS, NAIVE_SURVIVES, OUT_OF_SCOPE, find_tests


def test_no_fault_is_missing_a_test():
    assert not set(FAULTS) - set(find_tests()) - set(OUT_OF_SCOPE)


def test_every_name_is_that_of_a_fault_in_scope():
    assert set(find_tests()) <= set(FAULTS) - set(OUT_OF_SCOPE)
    assert set(NAIVE_SURVIVES) <= set(FAULTS) - set(OUT_OF_SCOPE)
