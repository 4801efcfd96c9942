"""A finished folder to the Hugging Face hub: created if it is not there, uploaded as one commit.

The folder is only read. Whatever the hub or the network does, it stays whole, and the message says how to try again.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from spectrim.errors import InputError, ResourceError, SpectrimError, UsageError, without_tokens
from spectrim.store import verify_manifest
from spectrim.store.manifest import MANIFEST

LEFT_AT_HOME = (".cache/*", ".git/*")
"""What git and the hub's own client put into a folder; everything else is in the manifest."""


def check_push(repo: str) -> None:
    """Refuse, before any work, a name that no repository can have, and a machine without a token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push-to {repo}: not a repository name ({error}); write USER/NAME") from error
    if repo.count("/") != 1:
        raise UsageError(f"--push-to {repo}: expected USER/NAME, e.g. ada/qwen-small")
    if get_token() is None:
        raise UsageError(
            "no Hugging Face token was found, and a push needs one that may write: `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repo: str, *, private: bool = False) -> dict[str, Any]:
    """Upload a folder that is exactly what spectrim published; returns the commit's address.

    InputError where the folder is not whole, UsageError for a name or a token that cannot do, ResourceError where the
    hub is not reachable or refuses.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():  # before anybody looks for a token; checksums, which take time, come after
        raise InputError(f"{folder}: has no {MANIFEST}; only folders that spectrim wrote can be pushed")
    check_push(repo)
    verify_manifest(folder)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="spectrim")
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message="Compressed with spectrim",
            ignore_patterns=list(LEFT_AT_HOME),
        )
    except Exception as error:  # the hub's own errors, httpx's, plain OS errors: no common type below Exception
        raise push_failed(error, folder, repo) from error
    return {"folder": str(folder), "repo": created.repo_id, "url": str(created), "commit": done.oid}


def push_failed(error: Exception, folder: Path, repo: str) -> SpectrimError:
    """What to say of a push that did not come about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(without_tokens(f"{type(error).__name__}: {error}").split())[:300]
    again = f"{folder} is whole; to push it later: spectrim push {folder} {repo}"
    if status in (401, 403):
        return UsageError(f"the hub does not let this token write to {repo} ({said}). {again}")
    if status is not None:
        return ResourceError(f"the hub refused the push to {repo} with HTTP {status} ({said}). {again}")
    return ResourceError(f"the hub cannot be reached, nothing is known to be at {repo} ({said}). {again}")
