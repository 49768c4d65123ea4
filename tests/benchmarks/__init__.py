"""What pruning costs: in time, in memory, between devices and to compile.

``python -m tests.benchmarks`` measures it; see ``python -m tests.benchmarks --help``.
"""
