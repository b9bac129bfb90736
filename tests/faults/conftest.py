"""Tests that ask for `way` run over each transport; those marked `full` in full runs alone."""

from pathlib import Path

import pytest

from kvtransfer.transports import ORDER


@pytest.fixture(params=ORDER)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: not in `--faults small`, which has a case like it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults") == "small":
        doubles = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=doubles)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(0))  # long runs are meant to be long
