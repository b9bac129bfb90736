"""Fixtures of the tests that compute."""

import shutil
from typing import cast

import pytest

from common.model.cpu.build import COMPILERS
from common.model.decoder import Kernels


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Every backend of the CPU in turn."""
    if request.param == "native" and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    return cast(Kernels, request.param)
