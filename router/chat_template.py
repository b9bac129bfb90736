"""A model's chat template: rendered exactly as transformers renders it, without transformers.

Importing transformers loads torch where it is installed, and the router must stay small. Owns the
sandboxed Jinja environment; called by `router.tokenizer`. Templates come from checkpoints and are
untrusted: they run in Jinja's immutable sandbox and see plain JSON values only.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ConfigError, RequestError

_MISHAPS: Final = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError,
                   ArithmeticError, RecursionError)  # fmt: skip


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 (the type that Jinja declares)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models never saw in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """One compiled template with the special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigError if `source` is not a valid template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.source = source
        self.knows_developer = "developer" in source
        """The template has the `developer` role; others get it as `system`."""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt text of a conversation. `variables`: more that the template may know; they
        replace special tokens but nothing else. Raises RequestError (400) if it refuses."""
        given = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(given)
        except _MISHAPS as error:
            # A template is the checkpoint's code: whatever it trips over is about these messages.
            message = f"The chat template refused the messages: {error}"
            raise RequestError(400, message, param="messages") from error
