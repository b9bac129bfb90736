"""Log lines on stderr, as text for people or as JSON for machines. Set up once by `main`.

`logger.info("placed", extra={"request": 7})` adds the field `request` to the line.
"""

import json
import logging
import sys
import time
from typing import Any

from common.config import LogConfig

PACKAGES = ("tandem", "common", "kvtransfer", "prefill", "decode", "router", "deploy")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO decode-1: message field=value`"""

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = (
            f"{clock}.{int(record.msecs):03d} {record.levelname} {self._who}: "
            f"{record.getMessage()}{fields}"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: ts (UTC), level, logger, role, worker, event, and the fields."""

    def __init__(self, role: str, ident: str) -> None:
        super().__init__()
        self._role = role
        self._ident = ident

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "ts": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": self._role,
            "worker": self._ident,
            "event": record.getMessage(),
        }
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup(config: LogConfig, role: str, ident: str) -> None:
    """Send all log records of this process to stderr.

    role: `router`, `prefill`, `decode` or `up`; ident: the name of this process in its role.
    Other people's loggers are kept at warnings and above unless `--log-level` is stricter.
    """
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(role, ident) if config.log_format == "json" else TextFormatter(ident or role)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
