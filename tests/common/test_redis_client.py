"""No password of Redis is shown."""

import pytest

from common.errors import ConfigError
from common.redis_client import check_redis, open_redis, without_password


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:1/0",
        "redis://user@host/0",
        "redis://[::1]:6379/0",
        "unix:///a/b?db=0",
        "localhost:6379",
    ],
)
def test_urls_without_password_are_shown_as_they_are(url: str) -> None:
    assert without_password(url) == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@host:1/0", "redis://user:***@host:1/0"),
        ("rediss://:s3@cret@host/0", "rediss://:***@host/0"),
        ("redis://:s3/cret@host/0", "redis://:***@host/0"),
        ("redis://:s3cret", "redis://:***"),
        ("redis://:s3cret@[::1]:77/0", "redis://:***@[::1]:77/0"),
        ("unix:///a/b?db=0&password=s3cret", "unix:///a/b?db=0&password=***"),
        ("redis://h/0?p%61ssword=s3cret&db=1", "redis://h/0?p%61ssword=***&db=1"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


async def test_errors_do_not_show_the_password() -> None:
    with pytest.raises(ConfigError) as refused:
        open_redis("redis://:s3cret@host:port/0")
    assert str(refused.value) == (
        "bad Redis URL redis://:***@host:port/0: its port or one of its options is wrong"
    )
    for url in ("redis://127.0.0.1:1/0?password=s3cret", "redis://:s3cret@127.0.0.1:1/0?x=1"):
        with pytest.raises(ConfigError) as unreachable:
            await check_redis(url)
        assert "s3cret" not in str(unreachable.value)
