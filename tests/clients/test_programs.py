"""Other clients, each as a small program in its own environment: installed by `make test-clients`.

A client that is not installed is skipped; its program says what it relies on.
"""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeCheckpoint
from tests.deployment import Deployment
from tests.system.serving import deployment

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".cache" / "clients" / "bin" / "python"
MODULES = HERE / "node" / "node_modules"


@pytest.fixture(scope="module")
def served(checkpoint: MakeCheckpoint) -> Iterator[Deployment]:
    with deployment(checkpoint("llama"), "--served-model-name", "tiny") as running:
        yield running


async def run(*command: str) -> None:
    """Runs a program; its exit code must be 0."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode(errors="replace")[-4_000:]


@pytest.mark.skipif(not PYTHON.exists(), reason="`make test-clients` installs it")
@pytest.mark.parametrize("name", ["langchain_client", "litellm_client", "llama_index_client"])
async def test_python_clients(served: Deployment, name: str) -> None:
    await run(str(PYTHON), str(HERE / "programs" / f"{name}.py"), served.url, "tiny")


@pytest.mark.skipif(not MODULES.exists(), reason="`make test-clients` installs it")
@pytest.mark.parametrize("name", ["openai", "ai"])
async def test_node_clients(served: Deployment, name: str) -> None:
    node = shutil.which("node")
    assert node is not None
    await run(node, str(HERE / "node" / f"{name}.mjs"), served.url, "tiny")
