"""Tests that ask for `transport` run once with each."""

import pytest

from kvtransfer.transports import ORDER
from tests.kvtransfer import node


@pytest.fixture(params=ORDER)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The transport of every `Node` of the test that does not ask for another one."""
    name = str(request.param)
    monkeypatch.setattr(node, "TRANSPORT", name)
    return name
