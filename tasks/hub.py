"""Push a folder to the Hugging Face Hub with the token of HF_TOKEN, into a repository that is new, empty or ours."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from infra.errors import ConfigError, LifecycleError
from infra.provenance import version_of

OURS = "lineage.json"
MADE_BY_THE_HUB = {".gitattributes"}


def ready(repo_id: str) -> str:
    """The token; refuses at once what could not be sent."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ConfigError(f"HF_TOKEN is not set; hf://{repo_id} needs a token of yours that may write")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"HF_HUB_OFFLINE is set, so nothing can be sent to hf://{repo_id}; unset it or give a folder")
    return token


def push(folder: Path, repo_id: str, message: str, private: bool = True) -> str:
    """One commit with exactly the folder's files; returns the address of the repository."""
    api = HfApi(token=ready(repo_id), library_name="t2i-lifecycle", library_version=version_of("t2i-lifecycle"))
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo_id)) - MADE_BY_THE_HUB
        if there and OURS not in there:
            raise ConfigError(
                f"hf://{repo_id} has {len(there)} file(s) that `t2i publish` did not write, such as {min(there)}; name a new repository"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Publish {message}", delete_patterns="*")
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"the Hub cannot be reached: {error}") from error
    except HfHubHTTPError as error:
        raise LifecycleError(
            f"the Hub refused hf://{repo_id}: {_told(error)}; what was sent before can be sent again"
        ) from error
    return str(made)


def _told(error: HfHubHTTPError) -> str:
    """The Hub's own words; no header, so no token."""
    status = getattr(error.response, "status_code", "no answer")
    return f"{status} {error.server_message or ''}".strip()
