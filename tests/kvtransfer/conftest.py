"""Tests that ask for `transport` run once with each."""

from pathlib import Path

import pytest

from kvtransfer.transports import ORDER
from kvtransfer.ucx_transport import is_installed
from tests.kvtransfer import node

UCX = pytest.param(
    "ucx",
    marks=[
        pytest.mark.ucx,
        pytest.mark.skipif(not is_installed(), reason="ucxx cannot be imported: the extra `ucx`"),
    ],
)


ON_UCX = "test_ucx"
"""The module whose tests run on ucx in every run; others do in the full fault runs, since each
endpoint on ucx starts a process."""

ON_STAGED = ("test_cutting", "test_endpoint", "test_staging")
"""The modules whose tests run with staged pools in every run."""
STAGED = [
    pytest.param(f"staged-{name}", marks=[pytest.mark.staged, *marks])
    for name, marks in (*((name, ()) for name in ORDER), ("ucx", UCX.marks))
]
"""Transports between pools that they cannot reach."""
NUM_SLOTS = 24
"""Few enough that blocks wait for each other."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults") != "small":
        return
    slow = {
        item
        for item in items
        if item.path.parent == Path(__file__).parent
        and (
            (item.get_closest_marker("ucx") and item.path.stem != ON_UCX)
            or (item.get_closest_marker("staged") and item.path.stem not in ON_STAGED)
        )
    }
    if slow:
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(params=[*ORDER, UCX, *STAGED])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The transport of every `Node` of the test that does not ask for another one."""
    name = str(request.param)
    if name.startswith("staged-"):
        name = name.removeprefix("staged-")
        monkeypatch.setattr(node, "NUM_SLOTS", NUM_SLOTS)
    monkeypatch.setattr(node, "TRANSPORT", name)
    return name
