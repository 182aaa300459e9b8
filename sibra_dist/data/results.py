"""Folders of what was made for a request, such as recommendations: a manifest says what was asked, and what there is."""

import json
from typing import ClassVar, Self

from pydantic import ValidationError

from sibra_dist.config import Config
from sibra_dist.data.manifest import Side
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError

ID_COLUMNS: dict[Side, str] = {"users": "user_id", "items": "item_id"}
"""What columns of external ids are called in files."""


class Request(Config):
    """What was asked of a model: equal requests have equal files."""

    dataset: str
    """Digest of the dataset."""
    checkpoint: str
    """Name of the model's checkpoint; its digits at the end are those of one training."""
    package_version: str

    def differences(self, other: "Request") -> list[str]:
        """Names of what the two do not agree on."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


class ResultManifest(Config):
    """The manifest of such a folder."""

    file_name: ClassVar[str]
    what: ClassVar[str]
    """What the folder holds, in words."""
    command: ClassVar[str]
    """The command that makes it."""

    @classmethod
    def read(cls, place: Place) -> Self | None:
        """The manifest in a folder; None if there is none.

        Raises:
            DatasetError: it cannot be read.
        """
        try:
            return cls.model_validate(json.loads(place.read(cls.file_name)))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError) as error:
            raise DatasetError(
                f"{place / cls.file_name} cannot be read: {' '.join(str(error).split())[:200]}. "
                "Name another folder, or add --overwrite to replace what is there"
            ) from error

    @classmethod
    def of(cls, place: Place) -> Self:
        """The manifest in a folder.

        Raises:
            DatasetError: there is none, or it cannot be read.
        """
        found = cls.read(place)
        if found is None:
            raise DatasetError(f"{place} holds no {cls.what}: it has no {cls.file_name}. Use `sibra-dist {cls.command}`")
        return found

    def write(self, place: Place) -> None:
        """Write it, whole or not at all; `OSError` if it cannot be written."""
        place.write(self.file_name, json.dumps(self.model_dump(mode="json"), indent=2).encode() + b"\n")
