"""The changes that tests are put to are changes, and leave Python code."""

import ast

import mutants
import pytest


@pytest.mark.parametrize("room", mutants.ROOMS)
def test_every_mutant_is_another_program(room):
    original = ast.unparse(next(mutants.mutants(room)).tree)
    sources = [mutant.source() for mutant in mutants.mutants(room)]
    assert len(sources) > 30
    assert original not in sources
    for source in sources:
        ast.parse(source)


def test_a_mutant_leaves_the_tree_as_it_was():
    first = next(mutants.mutants("wide.py"))
    before = ast.unparse(first.tree)
    assert first.source() != before
    assert "->" in str(first)
    assert ast.unparse(first.tree) == before


def test_what_is_not_tried_would_be_a_change(monkeypatch):
    left_out = mutants.SAME
    monkeypatch.setattr(mutants, "SAME", set())
    rooms = {room for room, _ in left_out}
    tried = {(room, m.line()) for room in rooms for m in mutants.mutants(room)}
    assert left_out and left_out <= tried
