"""What every section of the configuration has in common, and the lists that a single text may stand for."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from comfyui_pcpo.json_text import parse_json

from .text_files import line_ends


def types_in(annotation: Any) -> set[type]:
    """The types in an annotation: float and NoneType in float | None, str and float in dict[str, float]."""
    return set[type]([annotation] if isinstance(annotation, type) else []).union(*map(types_in, get_args(annotation)))


class Section(BaseModel):
    """A section of the configuration: frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """true would count as 1, in a table of numbers too."""
        kinds = types_in(cls.model_fields[str(info.field_name)].annotation)
        values = value.values() if isinstance(value, dict) else [value]
        if not kinds.isdisjoint((int, float)) and any(isinstance(one, bool) for one in values):
            raise ValueError("must be a number, not true or false")
        return value


def one_or_more(value: Any) -> Any:
    """Accept a single string as a list of one."""
    return (value,) if isinstance(value, str) and value else value


def split_lines(value: Any) -> Any:
    """Accept texts of several lines as a list of lines; one that is a JSON object stays whole."""
    texts = one_or_more(value)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return texts
    return tuple(line for text in texts for line in ([text] if is_object(text) else line_ends(text).split("\n")))


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_more)]
Lines = Annotated[tuple[str, ...], BeforeValidator(split_lines)]
