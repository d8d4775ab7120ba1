"""The schema of a run file as JSON, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from bigtrain.config.fields import Section
from bigtrain.config.help import help_of
from bigtrain.config.keys import BASE, BASE_HELP, sections_in
from bigtrain.config.schema import Config


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, with every key's help."""
    schema = Config.model_json_schema()
    _describe(Config, schema)
    shapes = schema["$defs"]
    for section in _sections_below(Config):
        name = section.__name__
        _describe(section, shapes[name])
        if section.shorthand:
            shapes[name] = {"anyOf": [{"type": "string"}, shapes[name]]}
    schema["properties"][BASE] = {"type": "string", "description": BASE_HELP}
    return schema


def _describe(section: type[Section], shape: dict[str, Any]) -> None:
    for name, value in shape["properties"].items():
        value["description"] = help_of(section, name)


def _sections_below(section: type[Section]) -> set[type[Section]]:
    inside = {found for field in section.model_fields.values() for found in sections_in(field.annotation)}
    return inside.union(*map(_sections_below, inside))
