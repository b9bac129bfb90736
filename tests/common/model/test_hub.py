import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ModelError
from common.model.hub import resolve


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path), None) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~", None) == tmp_path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/directory", "no checkpoint directory '/no/such/directory'"),
        ("./missing", "no checkpoint directory './missing'"),
        ("a/b/c", "no checkpoint directory 'a/b/c'"),
        ("", "no checkpoint directory ''"),
        ("bad name!", "'bad name!' is neither a directory nor a valid Hub id"),
        (__file__, f"{__file__} is a file; --model takes a checkpoint directory or a Hub id"),
    ],
)
def test_what_is_no_model(model: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(model, None)
    assert str(error.value) == message


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://[::1]:9"}])
def test_a_hub_that_cannot_be_reached(setting: dict[str, str], tmp_path: Path) -> None:
    # The client reads its settings when it is imported: a process of its own.
    program = (
        "from common.errors import ModelError\n"
        "from common.model.hub import resolve\n"
        "try:\n    resolve('owner/model', None)\n"
        "except ModelError as error:\n    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "HF_HOME": str(tmp_path), "NO_PROXY": "*", **setting},
        timeout=60,
    )
    assert result.stdout == (
        "no directory 'owner/model', and as a Hub model it is not cached and the Hub cannot be "
        "reached\n"
    )
    assert result.returncode == 0
