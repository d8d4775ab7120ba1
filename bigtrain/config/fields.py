"""The building blocks of the schema: sections and named things.

A field says everything about itself in one place: its type and range, its default, and the sentence of help
beneath it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

JsonSchema: TypeAlias = dict[str, Any]

REFUSED = "refused"

_PATH_TO_OBJECT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def refuse(text: str, remedy: str, words: Iterable[str] = ()) -> PydanticCustomError:
    """What a validator raises.

    Args:
        text: It continues a sentence that begins with the key and its value.
        remedy: What to do.
        words: What the value may be; those near to it are proposed.
    """
    return PydanticCustomError(REFUSED, "{text}", {"text": text, "remedy": remedy, "words": list(words)})


class Section(BaseModel):
    """A part of the run file: immutable, without unknown keys, and no value is converted silently.

    The string under a field is its help; `help` reads it when somebody asks.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # a section is only ever validated as a part of the whole: built once, not twice
    )

    shorthand: ClassVar[str | None] = None
    """The key that a plain word stands for: `task: regression` is `task: {name: regression}`."""

    shorthand_is_one_key: ClassVar[bool] = False
    """Whether the word changes that key alone, as `optim=sgd`; else it is all there is, as a task without arguments."""

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        if value is None:  # `track:` with nothing below it
            return {}
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, str) else value


def _is_name(value: str) -> str:
    if ":" in value and not _PATH_TO_OBJECT.fullmatch(value):
        raise refuse(
            "is not of the form pkg.mod:attribute",
            "write the module's dotted path, a colon and the name in it",
        )
    if not value or value != value.strip():
        raise refuse("is not a name", "write a name without spaces around it")
    return value


Name: TypeAlias = Annotated[str, AfterValidator(_is_name)]


class Named(Section):
    """Something found by its name and built with arguments; without arguments the name alone will do."""

    shorthand = "name"

    name: Name
    """The name, or pkg.mod:attribute for your own."""

    args: dict[str, Any] = Field(default_factory=dict)
    """The keyword arguments that it is built with."""


class OneOrMany:
    """Lets one word stand for a list of it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @staticmethod
    def _listed(value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_Item = TypeVar("_Item")

# A list in YAML is no tuple, on which strictness would insist; the items stay strict.
ListOf: TypeAlias = Annotated[tuple[_Item, ...], Strict(False)]
Patterns: TypeAlias = Annotated[tuple[str, ...], Strict(False), OneOrMany()]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
Factor: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
