"""What a run asks of states that other runs have left for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from spectrim.engines.checkpoint import Saved
from spectrim.linalg.fallback import Fallback


class Taken(NamedTuple):
    """A state of other runs, whose stages and steps `resumed` are, and what did not go the usual way in them."""

    saved: Saved
    resumed: list[dict[str, Any]]
    fallbacks: list[Fallback]


class Given(Protocol):
    """States that come from other runs, and are theirs until this one's result is published: shard_parts.py."""

    def check(self, fields: Mapping[str, Any]) -> None:
        """`UsageError` unless all is there and was made from the same `fields` of the fingerprint."""
        ...

    def load(self, stage: str, fields: Mapping[str, Any]) -> Taken | None:
        """The state of a stage; None of stages that nobody else has."""
        ...

    def remove(self) -> None:
        """The result is there."""
        ...
