"""A deployment whose processes talk over authenticated, encrypted links."""

from pathlib import Path

import pytest

from deploy.cli import main
from tests.client import complete, http
from tests.conftest import MakeCheckpoint
from tests.system.serving import deployment, settled

pytestmark = pytest.mark.system


async def test_deployment_with_keys_serves(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", "cluster", str(tmp_path)]) == 0
    assert "cluster.key_secret" in capsys.readouterr().out
    keys = ("--curve-key", str(tmp_path / "cluster.key_secret"), "--curve-allow", str(tmp_path))
    with deployment(checkpoint("llama"), *keys, "--transport", "zmq") as served:
        async with http(served.url) as client:
            workers = (await client.get("/debug/workers")).json()["workers"]
            assert len(workers) == 2
            answer = await complete(client, list(range(10, 60)), max_tokens=8)
            assert answer.error is None and len(answer.ids) == 8
            await settled(client, 15)
