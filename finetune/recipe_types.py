"""What the sections of a recipe are made of: texts, counts, lists without repetition; closed, frozen sections."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from finetune.recipe_problems import Expects

LARGEST_NUMBER = 2**31 - 1
UNIQUE_ITEMS: dict[str, Any] = {"uniqueItems": True}

Item = TypeVar("Item")


def each_once(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The same items.

    Raises:
        PydanticCustomError: one of them stands there twice.
    """
    for i, item in enumerate(items):
        if item in items[:i]:
            raise PydanticCustomError("repeated_item", "repeated: {item}", {"item": item})
    return items


Text = Annotated[str, Field(pattern=r"\S")]  # at least one visible character
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[
    Annotated[int, Field(gt=0, le=LARGEST_NUMBER)] | Annotated[float, Field(gt=0)], Expects("a number above 0")
]
Names = Annotated[Texts, AfterValidator(each_once), Field(json_schema_extra=UNIQUE_ITEMS)]


class Section(BaseModel):
    """Closed and frozen; nothing is converted: "32" is not 32, true is not 1, NaN is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
