"""A vLLM plugin that lets its NIXL connector run on few cores; loaded for vLLM 1P1D only.

Installed into the rival's venv by `benchmarks.compare.install`; nothing of ours imports it. Stock,
the connector moves the whole process to the machine's last core, and NIXL's progress thread spins
on the one core that the model has: both make vLLM slower than it need be, so both are undone.
"""

import functools
import importlib
import os


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; runs in every process of vLLM."""
    os.sched_setaffinity = lambda pid, cores: None
    api = importlib.import_module("nixl._api")
    api.nixl_agent_config = functools.partial(  # type: ignore[attr-defined]
        api.nixl_agent_config, enable_prog_thread=False
    )
