"""A configuration dataclass as flags and variables, there and back."""

from dataclasses import dataclass

import pytest

from common.config import (
    DTYPES,
    ModelConfig,
    RouterConfig,
    UpConfig,
    WorkerConfig,
    flag,
)
from common.errors import ConfigError, UsageError
from common.flags import parse, to_argv, to_env


@dataclass(frozen=True, kw_only=True)
class Small:
    """A few flags of every kind."""

    name: str | None = flag(None, "a name")
    size: int = flag(3, "a size in % of all")
    rate: float = flag(0.5, "a rate")
    warm: bool = flag(True, "warm up first")
    colour: str = flag("red", "a colour", choices=("red", "blue"))
    pin: str | None = flag(None, "stands alone or not", const="auto")
    key: str | None = flag(None, "nobody else's business", secret=True, hidden=True)


def test_defaults_without_flags_and_variables() -> None:
    assert parse(Small, [], "small", {}) == Small()


def test_flag_beats_variable_beats_default() -> None:
    env = {"TANDEM_SIZE": "5", "TANDEM_RATE": "0.25", "TANDEM_WARM": "no"}
    assert parse(Small, ["--size", "7"], "small", env) == Small(size=7, rate=0.25, warm=False)


def test_empty_variable_is_unset() -> None:
    assert parse(Small, [], "small", {"TANDEM_SIZE": "", "TANDEM_NAME": ""}) == Small()


@pytest.mark.parametrize(
    ("argv", "value"), [(["--warm"], True), (["--no-warm"], False), ([], True)]
)
def test_bool(argv: list[str], value: bool) -> None:
    assert parse(Small, argv, "small", {}).warm is value


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--pin"], "auto"),
        (["--pin", "0,1"], "0,1"),
        (["--pin=2"], "2"),
        (["--pin", "--no-warm"], "auto"),
    ],
)
def test_flag_that_may_stand_alone(argv: list[str], value: str | None) -> None:
    assert parse(Small, argv, "small", {}).pin == value


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["--size", "x"], {}, "--size: 'x' is not a whole number"),
        ([], {"TANDEM_RATE": "fast"}, "TANDEM_RATE: 'fast' is not a number"),
        ([], {"TANDEM_WARM": "maybe"}, "TANDEM_WARM: 'maybe' is not true or false"),
        (["--colour=green"], {}, "--colour: 'green' is not one of red, blue"),
        (["--siz", "3"], {}, "unrecognized arguments: --siz 3 (see small --help)"),
        (["extra"], {}, "unrecognized arguments: extra (see small --help)"),
        (["--name"], {}, "argument --name: expected one argument (see small --help)"),
    ],
)
def test_errors_are_one_clear_line(argv: list[str], env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(Small, argv, "small", env)
    assert str(error.value) == message


def test_a_value_that_the_dataclass_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^--block-size 17 is not a multiple of 16$"):
        parse(ModelConfig, ["--block-size", "17"], "tandem up", {})
    assert issubclass(UsageError, ConfigError)


def test_help_names_flag_text_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(Small, ["--help"], "small", {})
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A few flags of every kind." in text
    assert "--size N a size in % of all [TANDEM_SIZE; default: 3]" in text
    assert "--warm, --no-warm warm up first [TANDEM_WARM; default: true]" in text
    assert "--colour {red,blue} a colour [TANDEM_COLOUR; default: red]" in text
    assert "--name TEXT a name [TANDEM_NAME]" in text
    assert "--pin [TEXT]" in text
    assert "business" not in text


@pytest.mark.parametrize(
    "config",
    [
        Small(),
        Small(name="-dash and space", size=-4, rate=1e-9, warm=False, colour="blue", pin="0,1"),
        WorkerConfig(model="a b", kv_memory="1G", max_model_len=4096, pin_cores="auto"),
        RouterConfig(host="127.0.0.2", port=0, max_resumes=0, log_format="json"),
        UpConfig(prefill=0, decode=3, lease_s=2.5, namespace="x"),
    ],
)
def test_round_trip(config: object) -> None:
    assert parse(type(config), to_argv(config), "prog", {}) == config


def test_secrets_travel_as_variables_and_other_variables_of_ours_do_not() -> None:
    config = Small(size=9, key="s3cret")
    assert to_argv(config) == ["--size=9"]
    env = to_env(config, {"PATH": "/bin", "TANDEM_SIZE": "1"})
    assert env == {"PATH": "/bin", "TANDEM_KEY": "s3cret"}
    assert parse(Small, to_argv(config), "small", env) == config


def test_up_has_every_promised_flag() -> None:
    promised = (
        "model prefill decode port host transport redis dtype block_size kv_memory max_model_len "
        "served_model_name api_key pin_cores device max_num_seqs max_num_batched_tokens "
        "chat_template revision log_level log_format"
    )
    values = {"dtype": DTYPES[1], "transport": "zmq", "log_level": "debug", "log_format": "json"}
    values |= {"device": "cuda:0,1", "redis": "redis://host:1/0", "host": "::1"}
    for name in promised.split():
        text = values.get(name, "16")
        option = "--" + name.replace("_", "-")
        by_flag = parse(UpConfig, [option, text], "tandem up", {})
        by_variable = parse(UpConfig, [], "tandem up", {f"TANDEM_{name.upper()}": text})
        assert by_flag == by_variable
        assert str(getattr(by_flag, name)) == text
