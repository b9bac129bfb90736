"""Configuration of every process: one frozen dataclass each, made once in `main`.

A field's metadata carries its help text; `common.flags` turns a dataclass into command-line flags
and `TANDEM_*` variables (flag > variable > default). Times are in seconds.
"""

import inspect
import ipaddress
from dataclasses import dataclass, field
from typing import Any

from common.errors import ConfigError

TRANSPORTS = ("auto", "shm", "ucx", "tcp", "zmq")
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("none", "int8", "int4", "w8a8")


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A configuration field with its help text.

    metadata: `choices` (allowed values), `const` (value of a flag that stands alone), `short`
    (one-letter flag), `hidden` (not in --help), `secret` (given to children as a variable).
    """
    return field(default=default, metadata={"help": help, **metadata})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that is bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    log_level: str = flag(
        "info", "least severe level that is logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = flag("text", "log lines for people or for machines", choices=("text", "json"))


@dataclass(frozen=True, kw_only=True)
class TimerConfig:
    """Timers of the protocol between processes."""

    heartbeat_s: float = flag(1.0, "interval of pings between router and worker")
    dead_after: int = flag(3, "missed heartbeats after which a worker is dead")
    lease_s: float = flag(
        10.0, "how long a prefill worker keeps blocks for a decode worker that is silent"
    )
    stall_s: float = flag(5.0, "a transfer without progress for this long has failed")
    drain_s: float = flag(30.0, "how long a leaving process finishes what it holds")
    registry_ttl_s: float = flag(10.0, "life of a worker's registry entry without renewal")
    router_silence_s: float = flag(
        10.0, "a worker cancels the requests of a router that is silent for this long"
    )

    hang_s: float = flag(
        30.0, "a worker that has work and makes no step for this long, and for 3 times its longest "
        "recent step, gets no requests until it goes on"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "lease_s", "stall_s", "drain_s", "registry_ttl_s", "hang_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
        if self.dead_after < 1:
            raise ConfigError("--dead-after must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RedisConfig:
    redis: str | None = flag(
        None, "Redis URL, such as redis://127.0.0.1:6379/0; none: `tandem up` starts its own",
        secret=True,
    )  # fmt: skip
    namespace: str = flag("default", "prefix of all Redis keys: deployments that share a Redis")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str | None = flag(None, "checkpoint directory or Hugging Face Hub id")
    revision: str | None = flag(None, "branch, tag or commit of a Hub model")
    dtype: str = flag("auto", "dtype of weights and KV; auto: bfloat16 where it is fast, else "
                      "float32", choices=DTYPES)  # fmt: skip
    quantize: str = flag(
        "none", "weights in 8 or 4 bits, from the checkpoint at start (CPU): int8, int4 (groups of "
        "128), or w8a8 with activations in 8 bits too, the fastest for prompts",
        choices=QUANTIZATIONS,
    )  # fmt: skip
    block_size: int = flag(0, "tokens per KV block, a multiple of 16; 0: 16 on CPU, 64 on GPU")
    kv_memory: str | None = flag(
        None, "memory of one worker's KV pool, such as 512M or 4G; none: from what is free"
    )
    stage_memory: str = flag(
        "256M", "host memory of one worker that blocks go through where its KV pool is on a GPU"
    )
    stage_kv: bool = flag(
        False, "let them go through it on CPUs too: for tests, and to measure what that costs"
    )
    max_model_len: int = flag(0, "longest prompt plus output in tokens; 0: what the model allows")
    max_num_seqs: int = flag(64, "sequences that one worker runs at a time")
    max_num_batched_tokens: int = flag(512, "token budget of one engine step (chunked prefill)")
    device: str = flag("auto", "auto, cpu, cuda or cuda:0,1")
    pin_cores: str | None = flag(
        None, "pin each worker to its own cores; alone: spread all cores, or a list such as 0,1",
        const="auto",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.block_size % 16 or self.block_size < 0:
            raise ConfigError(f"--block-size {self.block_size} is not a multiple of 16")
        if self.max_num_seqs < 1:
            raise ConfigError("--max-num-seqs must be at least 1")
        if self.max_num_batched_tokens < 1:
            raise ConfigError("--max-num-batched-tokens must be at least 1")
        if self.max_model_len < 0:
            raise ConfigError("--max-model-len must not be negative")


@dataclass(frozen=True, kw_only=True)
class ExposureConfig:
    insecure: bool = flag(False, "allow other machines to connect without any authentication")


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """CurveZMQ between the processes; see `common.curve`."""

    curve_key: str | None = flag(
        None, "file with this process's secret CurveZMQ key (`tandem keygen` writes one); links "
        "between processes are then encrypted and authenticated"
    )  # fmt: skip
    curve_allow: str | None = flag(
        None, "directory with the public keys (*.key) of the processes that may connect"
    )

    def __post_init__(self) -> None:
        if (self.curve_key is None) != (self.curve_allow is None):
            raise ConfigError("--curve-key and --curve-allow go together")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(LogConfig, TimerConfig, RedisConfig, ModelConfig, ExposureConfig, CurveConfig):
    """One prefill or decode worker."""

    worker_host: str = flag("127.0.0.1", "address that the worker binds and announces")
    worker_id: str | None = flag(None, "name of this worker; none: a random one")
    threads: int = flag(0, "compute threads; 0: all cores that this process may use")
    kv_blocks: int = flag(0, "blocks of the KV pool; 0: from --kv-memory")
    transport: str = flag("auto", "how KV blocks travel between workers", choices=TRANSPORTS)

    def __post_init__(self) -> None:
        # One call each: the bases are siblings and do not call each other.
        TimerConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        CurveConfig.__post_init__(self)
        if self.threads < 0:
            raise ConfigError("--threads must not be negative")
        if not is_loopback(self.worker_host) and self.curve_key is None and not self.insecure:
            raise ConfigError(
                f"--worker-host {self.worker_host} can be reached by other machines: set "
                "--curve-key, or trust everybody there with --insecure"
            )


@dataclass(frozen=True, kw_only=True)
class HttpConfig(ExposureConfig):
    host: str = flag("127.0.0.1", "address that the router's HTTP server binds")
    port: int = flag(8000, "port of the router's HTTP server; 0: any free one")
    served_model_name: str | None = flag(None, "name in the API; none: the --model value")
    api_key: str | None = flag(None, "key that clients must send as a Bearer token", secret=True)
    api_keys: str | None = flag(
        None, "file with hashed keys of tenants, a line `TENANT SHA256` each; read anew on change"
    )
    api_keys_in_redis: bool = flag(
        False, "take hashed keys of tenants from Redis too: the hash tandem:NAMESPACE:api-keys"
    )
    allowed_origins: str | None = flag(
        None,
        "origins whose pages may use the API from a browser, with commas between or as a "
        "JSON list; * for all; none: no page may",
    )
    allowed_methods: str = flag("*", "methods that those pages may use, with commas between")
    allowed_headers: str = flag("*", "headers that those pages may send, with commas between")
    allow_credentials: bool = flag(False, "let those pages send cookies; not with origins *")
    ssl_certfile: str | None = flag(None, "file with the TLS certificate: the API is then HTTPS")
    ssl_keyfile: str | None = flag(None, "file with its key, if the certificate's has none")
    chat_template: str | None = flag(None, "file with a chat template in place of the model's own")
    tool_call_parser: str | None = flag(
        None, "how the model writes calls of tools; none: as its chat template shows",
        choices=("hermes", "llama3_json", "mistral"),
    )  # fmt: skip
    keep_alive_s: float = flag(
        75.0, "seconds that an idle connection is kept; longer than clients keep theirs"
    )
    max_n: int = flag(128, "most choices (`n`) of one request")
    max_best_of: int = flag(128, "largest `best_of`")
    max_logprobs: int = flag(20, "most logprobs per token")
    max_stop: int = flag(16, "most stop strings, and most stop token ids")
    max_stop_length: int = flag(1_024, "characters of the longest stop string")
    max_logit_bias: int = flag(1_024, "most entries of `logit_bias`")
    max_messages: int = flag(2_048, "most messages of one chat")
    max_body_bytes: int = flag(16 << 20, "largest request body")
    max_header_bytes: int = flag(32 << 10, "largest request line and headers of one request")
    max_json_depth: int = flag(64, "deepest nesting of a request body")
    max_json_values: int = flag(
        1 << 20, "most commas and opening brackets of a request body, about as many as its values"
    )
    max_upload_s: int = flag(60, "seconds that a request body may take to arrive")
    max_resumes: int = flag(3, "failures of workers that one request survives")
    max_waiting: int = flag(1_024, "requests that wait at the router while all workers are busy")
    max_waiting_tokens: int = flag(1 << 24, "tokens of their prompts")
    max_waiting_bytes: int = flag(1 << 30, "memory that they take")
    explain_log: str | None = flag(
        None, "file to which a line of JSON is added for each request: where it went and why, and "
        "what its first token took, part by part"
    )  # fmt: skip
    slo_ttft: str | None = flag(
        None, "limit of the first token, such as 500ms or 2s+1.5x (a time, and times the prefill "
        "of the prompt without any cache); what cannot meet it is refused with 429 at once; none: "
        "everything waits its turn",
    )  # fmt: skip
    slo_itl: str | None = flag(
        None, "limit of the time between two tokens, such as 50ms; none: nothing is refused for it"
    )
    local_prefill: str = flag(
        "auto", "when decode workers compute prompts beside their tokens: where it costs less and "
        "steps stay within --slo-itl (50ms if not set), or only where no prefill worker can",
        choices=("auto", "fallback"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in inspect.get_annotations(HttpConfig):
            least = 0 if name in ("max_logprobs", "max_resumes") else 1
            if name.startswith("max_") and getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.max_json_depth > 256:
            raise ConfigError("--max-json-depth must be at most 256")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        if self.allow_credentials and "*" in (self.allowed_origins or "*"):
            raise ConfigError("--allow-credentials needs --allowed-origins that are named")
        if self.api_key is not None and self.api_key.strip() != (self.api_key or " "):
            raise ConfigError("--api-key must not be empty, nor begin or end with a blank")
        has_keys = bool(self.api_key or self.api_keys or self.api_keys_in_redis)
        if not is_loopback(self.host) and not has_keys and not self.insecure:
            raise ConfigError(
                f"--host {self.host} can be reached by other machines: set --api-key, or serve "
                "everybody with --insecure"
            )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(LogConfig, TimerConfig, RedisConfig, HttpConfig, CurveConfig):
    """One router."""

    model: str | None = flag(None, "checkpoint directory or Hub id whose tokenizer is used")
    revision: str | None = flag(None, "branch, tag or commit of a Hub model")
    max_model_len: int = flag(0, "longest prompt plus output; 0: what the workers say")

    def __post_init__(self) -> None:
        TimerConfig.__post_init__(self)
        HttpConfig.__post_init__(self)
        CurveConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class UpConfig(LogConfig, TimerConfig, RedisConfig, ModelConfig, HttpConfig, CurveConfig):
    """A whole deployment on this machine."""

    prefill: int = flag(1, "prefill workers; 0: the decode workers prefill themselves")
    decode: int = flag(1, "decode workers")
    transport: str = flag("auto", "how KV blocks travel between workers", choices=TRANSPORTS)
    kv_blocks: int = flag(0, "blocks of each worker's KV pool; 0: from --kv-memory")
    threads: int = flag(0, "compute threads of each worker; 0: the cores divided by the workers")
    start_timeout_s: float = flag(600.0, "how long the workers may take to load the model")

    def __post_init__(self) -> None:
        TimerConfig.__post_init__(self)
        ModelConfig.__post_init__(self)
        HttpConfig.__post_init__(self)
        CurveConfig.__post_init__(self)
        if self.prefill < 0 or self.decode < 1:
            raise ConfigError("--prefill must be at least 0 and --decode at least 1")
        if self.threads < 0:
            raise ConfigError("--threads must not be negative")
