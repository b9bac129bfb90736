"""HTTPS with a certificate that is made on the spot."""

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from common.config import RouterConfig
from common.errors import ConfigError
from deploy.readiness import http_get
from router.cors import Cors
from router.server import Tls
from tests.client import complete, stream
from tests.router.conftest import Deploy

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    tls = Tls(str(directory / "cert.pem"), str(directory / "key.pem"))
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=tandem", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-out", tls.certificate, "-keyout", str(tls.key)]
    subprocess.run(command, check=True, capture_output=True)
    return tls


async def test_https(deploy: Deploy, files: Tls) -> None:
    async with deploy(prefill=0, tls=files) as served:
        assert served.url.startswith("https://")
        whole = await complete(served.http, PROMPT, seed=1)
        assert (await stream(served.http, PROMPT, seed=1)).tokens == whole.tokens
        assert (await http_get(f"{served.url}/health"))[0] == 200
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
                await stranger.get(f"{served.url}/health")


def test_files_are_checked_at_start(files: Tls, tmp_path: Path) -> None:
    assert Tls.of(RouterConfig()) is None
    config = RouterConfig(ssl_certfile=files.certificate, ssl_keyfile=files.key)
    assert Tls.of(config) == files
    (tmp_path / "bad").write_text("no certificate")
    for name in ("bad", "none"):
        with pytest.raises(ConfigError, match="--ssl-certfile"):
            Tls.of(RouterConfig(ssl_certfile=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="--ssl-keyfile needs"):
        RouterConfig(ssl_keyfile="x")


def test_lists_of_cors() -> None:
    config = RouterConfig(allowed_origins='["http://a", "http://b"]', allowed_methods="GET, POST")
    assert Cors.of(config) == Cors(origins=("http://a", "http://b"), methods=("GET", "POST"))
    assert Cors.of(RouterConfig()) == Cors()
    with pytest.raises(ConfigError, match="JSON list"):
        Cors.of(RouterConfig(allowed_origins="[5]"))
    for origins in (None, "*"):
        with pytest.raises(ConfigError, match="--allow-credentials"):
            RouterConfig(allow_credentials=True, allowed_origins=origins)
