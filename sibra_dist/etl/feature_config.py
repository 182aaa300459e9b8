"""What `sibra-dist prepare` is told of one feature."""

import re
import warnings
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sibra_dist.config import Config
from sibra_dist.encoding.texts import TextEncoder, TfidfConfig

Columns = str | tuple[str, ...]


class FeatureConfig(Config):
    """One feature of users or of items."""

    kind: Literal["category", "tags", "numeric", "vector", "text"]
    column: Columns | None = None
    """The column or columns it is read from; by default the one of the feature's own name. numeric and vector may have
    several numbers, text several texts."""
    pattern: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression that Python and Java both read: what it finds first in the text of a column counts as the value (its
    first group, if it has one); where it finds nothing, the value is absent."""
    separator: Annotated[str, Field(min_length=1)] = "|"
    """tags, vector: what stands between two of them, where the column is text and no JSON list."""
    scale: Literal["standard", "minmax", "none"] = "standard"
    """numeric: fitted on the training entities."""
    min_count: Annotated[int, Field(ge=1)] = 1
    """category, tags: values that fewer training entities have share the out-of-vocabulary code."""
    max_size: Annotated[int, Field(ge=1)] = 100_000
    """category, tags: so many values at the most get a code of their own, the commonest."""
    encoder: TextEncoder = TfidfConfig()
    """text: what makes a vector of it."""

    @field_validator("pattern")
    @classmethod
    def _is_a_regular_expression(cls, pattern: str | None) -> str | None:
        try:
            with warnings.catch_warnings():
                # What Python will read otherwise some day is Java's concern.
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression that Python reads: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _has_several_columns_only_where_they_make_one(self) -> Self:
        if self.column is not None and not self.column:
            raise ValueError("name at least one column, or leave `column` out")
        if self.kind in ("category", "tags") and isinstance(self.column, tuple):
            raise ValueError(f"a {self.kind} feature is read from one column; only numeric, vector and text may have several")
        return self
