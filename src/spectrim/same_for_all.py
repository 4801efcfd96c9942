"""That the processes of one run were started alike: the same request, versions, model files and arithmetic."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from spectrim import version
from spectrim.engines.unspread import require_one_precision
from spectrim.errors import UsageError
from spectrim.linalg.fallback import Fallback
from spectrim.models.load import Source, pick_device
from spectrim.processes import present
from spectrim.store.manifest import measure_file

if TYPE_CHECKING:
    from spectrim.eval_job import EvalRequest
    from spectrim.request import Request


def require_same(request: "Request | EvalRequest", source: Source) -> list[str]:
    """That all ranks do the same with the same; returns what there is to say. Each host reads its files once."""
    group = present()
    if group.alone:
        return []
    asked = json.dumps({**dataclasses.asdict(request), "model": ""}, sort_keys=True, default=str)
    group.refuse_unequal("request", _short_hash(asked), "start all of them with the same command")
    versions = f"spectrim {version.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    group.refuse_unequal("environment", versions, "install the same versions on all hosts")
    names = [*source.checkpoint.shards, source.folder / "config.json"]
    sizes = {path.name: path.stat().st_size for path in names}
    group.refuse_unequal("model", str(sizes), "copy the same folder to all hosts")
    reads = group.local_rank == 0
    found = {path.name: measure_file(path, source.folder) for path in names} if reads else None
    hashes = group.objects(None if found is None else _short_hash(json.dumps(found, sort_keys=True)))
    for member, own in zip(group.members, hashes, strict=True):
        if own is not None and own != hashes[0]:
            raise UsageError(
                f"{member} reads another model than {group.members[0]}: the files of {source.folder} have the same "
                "names and sizes there, and other bytes. Copy the same folder to all hosts"
            )
    return require_one_precision(pick_device(request.device))


def facts_of_processes() -> dict[str, Any]:
    """For the report: how many there were, on how many hosts; nothing of a run by one."""
    group = present()
    return {} if group.alone else {"processes": {"count": group.world, "hosts": len({m.host for m in group.members})}}


def of_all_ranks(fallbacks: list[Fallback]) -> list[Fallback]:
    """Fallbacks of this rank and, on the first, of all others."""
    found = present().objects(list(fallbacks))
    return [fallback for own in found for fallback in own] if present().is_first else fallbacks


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
