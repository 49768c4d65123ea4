"""What must never happen, and the test that shows that it does not.

``python -m tests.faults`` runs the tests and prints the catalogue with their verdicts.
"""
