"""Tests that ask for `way` run once over each transport."""

import pytest

from kvtransfer.transports import ORDER


@pytest.fixture(params=ORDER)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)
