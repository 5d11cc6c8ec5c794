"""Resolves hub ids to folders: found in the local cache or downloaded, only here, and never silently.

Knows ids, revisions and file names, and nothing about the files' contents.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from llava_core.checkpoints.access import check_access
from llava_core.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

# The files wanted from a repository; where weights exist as safetensors and as `.bin`, only the former.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "mm_projector.bin", "non_lora_trainables*.bin"]
_ALSO_WITHOUT_SAFETENSORS = ["*.bin"]


class Hub:
    """Finds checkpoints by folder or hub id. `found` has the revision of every id that was found.

    With `offline` nothing is downloaded. `revisions` pins all ids that may be used; None means the newest revision of
    each, which one Hub looks up only once.
    """

    def __init__(self, *, offline: bool = False, revisions: Mapping[str, str] | None = None) -> None:
        self.offline = offline
        self._revisions = revisions
        self.found: dict[str, str] = {}

    def is_pinned(self, name: str) -> bool:
        """Whether this id is pinned to a revision, so that nothing else may be used in its place."""
        return name in (self._revisions or ())

    def find(self, path_or_id: str, role: str) -> Path:
        """The folder of a checkpoint: the path itself, or a hub id's snapshot. `role` names its purpose in messages.

        Raises CheckpointError when there is neither.
        """
        if not self.is_pinned(path_or_id):
            # Not Path.expanduser, which raises for an unknown user.
            path = Path(os.path.expanduser(path_or_id))
            check_access(path)
            # Not Path.is_dir, which raises for names that no folder can have.
            if path_or_id and os.path.isdir(path):
                return path
            if path.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") != 1:
                raise CheckpointError(
                    f"{path_or_id!r}, {role}: no such checkpoint folder; give a folder or a hub id like owner/name"
                )
            if self._revisions is not None:
                raise CheckpointError(f"{path_or_id}, {role}, is not among the revisions to use; add its revision")
        folder = self._find_snapshot(path_or_id, role)
        # The hub's client names a snapshot's folder by its revision.
        self.found[path_or_id] = folder.name
        return folder

    def find_here(self, repo_id: str, needs: str) -> Path | None:
        """A usable snapshot in the local cache that has the file it `needs`, else None; nothing is downloaded.

        A snapshot without that file, such as an unfinished download, is not found, and its revision is not recorded.
        """
        here = Hub(offline=True, revisions=self._revisions)
        try:
            folder = here.find(repo_id, "what is here")
        except CheckpointError:
            return None
        if not (folder / needs).exists():
            return None
        self.found |= here.found
        return folder

    def _find_snapshot(self, repo_id: str, role: str) -> Path:
        from huggingface_hub import constants, snapshot_download

        revision = self.found.get(repo_id) or (self._revisions or {}).get(repo_id)
        offline = self.offline or constants.HF_HUB_OFFLINE
        try:
            patterns = _PATTERNS if offline else _look_up(repo_id, revision, role)
            return Path(
                snapshot_download(repo_id, revision=revision, local_files_only=offline, allow_patterns=patterns)
            )
        except (OSError, ValueError, _http_error()) as error:
            wanted = f"{repo_id}, {role}," if revision is None else f"{repo_id} at revision {revision}, {role},"
            reason = "nothing may be fetched" if offline else f"fetching it failed ({type(error).__name__})"
            raise CheckpointError(
                f"{wanted} is neither a folder here nor in the hub's local cache, and {reason}; "
                "download it first or give a folder"
            ) from error


def _http_error() -> type[Exception]:
    """The base exception of the hub client's HTTP library, which differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _look_up(repo_id: str, revision: str | None, role: str) -> list[str]:
    """The patterns of files to download from a repository. Logs the download if any file is missing locally."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except (OSError, _http_error()) as error:
        # Requesting the snapshot will show whether the cache suffices.
        name = type(error).__name__
        logger.info("%s, %s: no answer from %s (%s), using the local cache", repo_id, role, constants.ENDPOINT, name)
        return _PATTERNS
    files = {file.rfilename: file for file in info.siblings or ()}
    has_safetensors = any(Path(name).match("*model*.safetensors") for name in files)
    patterns = _PATTERNS if has_safetensors else _PATTERNS + _ALSO_WITHOUT_SAFETENSORS
    wanted = [file for name, file in files.items() if any(fnmatch(name, pattern) for pattern in patterns)]
    missing = [file.size or 0 for file in wanted if not _is_here(repo_id, file, info.sha)]
    if missing:
        logger.info(
            "%s, %s: downloading %d files (%.2f GB) of revision %s from %s",
            *(repo_id, role, len(missing), sum(missing) / 1e9, info.sha, constants.ENDPOINT),
        )
    return patterns


def _is_here(repo_id: str, file: RepoSibling, revision: str | None) -> bool:
    """Whether the cache has a file, in this revision or with the same content in another."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    if isinstance(try_to_load_from_cache(repo_id, file.rfilename, revision=revision), str):
        return True
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "blobs")
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return content is not None and (blobs / content).exists()
