"""The page about the API names every field that has no effect or is refused."""

from pathlib import Path

from router import response_schemas, schemas
from router.fields import Labelled

PAGE = Path(__file__).parents[2] / "docs" / "openai-api.md"


def test_every_field_without_effect_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = {*schemas.NEUTRAL, *response_schemas.NEUTRAL, *Labelled.model_fields}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
