"""What a section of a recipe is: frozen, strict to the letter, and able to say what contradicts what in it."""

from collections.abc import Iterator
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Contradiction", "ContradictionError", "Section"]


class Contradiction(NamedTuple):
    """Values that are each fine and do not go together. `key` is dotted, relative to the section that found it."""

    key: str
    message: str
    hint: str = ""


class ContradictionError(ValueError):
    """The contradictions of one section. A ValueError, because that is what pydantic collects into its own report."""

    def __init__(self, *found: Contradiction) -> None:
        super().__init__("; ".join(f"{each.message} ({each.hint})" if each.hint else each.message for each in found))
        self.found = found


class Section(BaseModel):
    """A frozen group of knobs that rejects unknown keys, coerced values and numbers that are not finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False, protected_namespaces=()
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """What is wrong between fields that are each right. Depends on values only, never on which were spelled out:
        whatever `model_dump` gives must load again."""
        return iter(())

    @model_validator(mode="after")
    def _has_no_contradictions(self) -> Self:
        if found := tuple(self.contradictions()):
            raise ContradictionError(*found)
        return self
