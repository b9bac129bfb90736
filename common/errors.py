"""The exceptions that cross a module boundary.

TandemError
├── ConfigError        a flag, a file or a checkpoint that cannot be used; ends the process, code 1
│   ├── UsageError     a command line or a variable that makes no sense; code 2
│   └── ModelError     a checkpoint that is missing, corrupt or of an unsupported architecture
├── ProtocolError      bytes from another process that are not a valid message for this one
└── RequestError       a client's request that cannot be served; carries the HTTP answer

A broken invariant inside a process is an assert, never one of these.
"""


class TandemError(Exception):
    """Base of all errors that Tandem raises on purpose."""


class ConfigError(TandemError):
    """The process cannot run as configured; `str()` is one line for the operator."""


class UsageError(ConfigError):
    """The command line or a `TANDEM_*` variable is wrong; ends the process with code 2."""


class ModelError(ConfigError):
    """The checkpoint cannot be served; `str()` names what is wrong and what is supported."""


class ProtocolError(TandemError):
    """A peer sent something that is not a valid message; it is dropped and counted."""


class RequestError(TandemError):
    """A request that is refused with an OpenAI error body.

    status: HTTP status. kind: OpenAI `type`. param and code: OpenAI `param` and `code`.
    retry_after_s: value for the Retry-After header, if any.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class GrammarError(TandemError):
    """A grammar is not valid, too complex, or does not accept the tokens so far."""
