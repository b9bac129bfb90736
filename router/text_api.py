"""`/tokenize` and `/detokenize`, as vLLM has them: prompts as token ids, without generating.

The routes are in `router.app`.
"""

from collections.abc import Callable
from typing import Any

from common.errors import RequestError
from router.caps import Caps
from router.fleet import Limits
from router.prompts import chat_prompt
from router.schemas import DetokenizeBody, TokenizeBody, TokenizeChatBody, parse
from router.tokenizer import TextModel


class TextApi:
    def __init__(self, text_model: TextModel, check_model: Callable[[str | None], None]) -> None:
        """check_model: raises RequestError for a model that is not served."""
        self._text_model = text_model
        self._check_model = check_model

    async def tokenize(self, data: object, limits: Limits, caps: Caps) -> dict[str, Any]:
        """A text (`prompt`), or a conversation (`messages`). Raises RequestError (400, 404)."""
        if isinstance(data, dict) and "messages" in data:
            body = parse(TokenizeChatBody, data, caps)
            self._check_model(body.model)
            shown = bool(body.return_token_strs)
            tokens = (await chat_prompt(body, self._text_model, limits)).tokens
        else:
            plain = parse(TokenizeBody, data)
            self._check_model(plain.model)
            shown = bool(plain.return_token_strs)
            (tokens,) = await self._text_model.encode_all(
                [plain.prompt], add_special_tokens=plain.add_special_tokens is not False
            )
        names = [self._text_model.backend.id_to_token(t) for t in tokens] if shown else None
        return {
            "count": len(tokens),
            "max_model_len": limits.context,
            "tokens": tokens,
            "token_strs": names,
        }

    async def detokenize(self, data: object, limits: Limits) -> dict[str, Any]:
        """Raises RequestError (400, 404)."""
        body = parse(DetokenizeBody, data)
        self._check_model(body.model)
        tokens = body.tokens
        if tokens and max(tokens) >= limits.vocab_size:
            message = f"Token id {max(tokens)} is not below {limits.vocab_size}."
            raise RequestError(400, message, param="tokens")
        return {"prompt": await self._text_model.decode_long(tokens)}


def no_embeddings() -> RequestError:
    """What this model cannot do."""
    message = "This model generates text; it does not support embeddings."
    return RequestError(400, message, code="unsupported_endpoint")
