"""Load client, trace replay, comparisons and micro-benchmarks.

`benchmarks.serve` (the `tandem bench serve` command) imports nothing of Tandem: it measures any
OpenAI-compatible server over HTTP.
"""
