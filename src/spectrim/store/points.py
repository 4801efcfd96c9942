"""The named moments of the storage protocol, in the order in which a run passes them.

After a kill at any of them the target is absent, what it was before, or complete, and the same command goes on. Tests
hold that for every name: they replace `reached` inside their own process. Nothing from outside can set it.
"""

POINTS: dict[str, str] = {
    "locked": "OUT.resume is there and locked; it says nothing yet",
    "record-written": "a fingerprint or the command lies under its temporary name",
    "record-renamed": "it has its name; the folder is not synced yet",
    "record-saved": "it is durable",
    "state-written": "a state lies under its temporary name",
    "state-synced": "its bytes are durable",
    "state-renamed": "it has taken the place of the older one; the folder is not synced yet",
    "state-saved": "it is durable",
    "state-forgotten": "a state that another stands for was removed",
    "staged": "OUT.partial-* is there and empty",
    "text-written": "a text or JSON file of the result is written, not synced",
    "text-synced": "its bytes are durable",
    "before-seal": "all files of the result are written, not all of them are synced",
    "before-publish": "all of them are durable, under the name of the partial folder",
    "old-set-aside": "no atomic exchange here: the old result is OUT.old-*, OUT is absent for a moment",
    "renamed": "OUT is the new result; the parent folder is not synced yet",
    "after-publish": "OUT is durable; what it replaced has the partial's name",
    "replaced-removed": "what it replaced is gone",
    "tidying": "states are being removed from OUT.resume, the fingerprint last",
    "tidied": "only the lock is left in OUT.resume",
}


def _nothing(_name: str) -> None:
    """What happens at a point."""


reached = _nothing


def point(name: str) -> None:
    """The run has come to this moment."""
    assert name in POINTS, f"{name!r} is not in POINTS"
    reached(name)
