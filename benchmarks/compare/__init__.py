"""Tandem beside other servers: same checkpoint, same cores, same load, one run, one table.

`python -m benchmarks.compare` measures; `python -m benchmarks.compare.install` installs rivals.
"""
