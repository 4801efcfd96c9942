"""What one text source gives, before several of them are put together."""

from collections.abc import Sequence
from typing import NamedTuple

BLANK_LINE = "\n\n"


class Part(NamedTuple):
    """Documents of one source; `joiner.join(documents)` is exactly the text of that source."""

    documents: tuple[str, ...]
    joiner: str
    note: str

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.documents))


def counted(documents: Sequence[str], *, limit: int | None) -> str:
    """`"3 documents, 1,200 characters"`, and says so when a limit ended the reading."""
    num_chars = sum(map(len, documents))
    num_documents = sum(1 for document in documents if document.strip())
    stopped = f" (stopped at the limit of {limit:,})" if limit is not None and num_chars >= limit else ""
    return f"{num_documents:,} documents, {num_chars:,} characters{stopped}"


def first_chars(documents: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """The leading documents that hold `limit` characters together; the last one is cut."""
    if limit is None:
        return tuple(documents)
    kept: list[str] = []
    left = limit
    for document in documents:
        if left <= 0:
            break
        kept.append(document[:left])
        left -= len(kept[-1])
    return tuple(kept)
