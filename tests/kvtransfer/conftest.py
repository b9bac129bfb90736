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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults") != "small":
        return
    slow = {
        item
        for item in items
        if item.get_closest_marker("ucx")
        and item.path.parent == Path(__file__).parent
        and item.path.stem != ON_UCX
    }
    if slow:
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(params=[*ORDER, UCX])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The transport of every `Node` of the test that does not ask for another one."""
    name = str(request.param)
    monkeypatch.setattr(node, "TRANSPORT", name)
    return name
