# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Upload files to a repository of the Hub in one commit, without sending what the Hub already has."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import sha_fileobj


logger = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where files are uploaded, and as whom.

    Args:
        repo_id: the repository.
        private: create it as private, if it does not exist.
        allow_public: allow a public repository although the source is not public.
        revision: branch, created if it does not exist; `main` by default.
        create_pr: open a pull request instead of pushing to the branch.
        token: of the Hub; by default the one of this machine.
    """

    repo_id: str
    private: bool = True
    allow_public: bool = False
    revision: str | None = None
    create_pr: bool = False
    token: str | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The operations of a commit: files to send, to copy from the source, and to delete."""

    adds: list[Any]
    copies: list[Any]
    deletions: list[Any]


def upload_files(
    files: Mapping[str, Path], destination: Destination, source: str | None, commit_message: str
) -> CommitInfo:
    """Upload files in one commit. Files are sent one by one; a repeated upload does not resend those that arrived.

    Weights in the repository that are not among `files` are deleted: a stale single file would be loaded instead of a
    new index.

    Args:
        files: paths by name in the repository.
        destination: the repository, and how to upload.
        source: the full model on the Hub, from which identical files are copied; None if it is not there.
        commit_message: of the commit.

    Raises:
        ValueError: if the repository is, or would be, public against `destination`.
        RuntimeError: if the Hub refuses; the message says what to do.
    """
    repo_id = destination.repo_id
    api = HfApi(token=destination.token)
    with explain_refusals(repo_id):
        source_info = api.model_info(source, files_metadata=True) if source else None
        head = _open_repository(api, destination, confidential=source_info is None or bool(source_info.private))
        repo_id = head.id  # with its namespace, whether or not that was given
        plan = _plan_commit(files, head, source if source != repo_id else None, source_info)
        logger.info(
            f"{repo_id}: {len(plan.adds)} files to send, {len(plan.copies)} to copy from {source}, "
            f"{len(plan.deletions)} to delete."
        )
        place: dict[str, Any] = {"revision": destination.revision, "create_pr": destination.create_pr}
        if destination.create_pr:
            place["revision"] = None
        for operation in sorted(plan.adds, key=lambda operation: operation.upload_info.size):
            api.preupload_lfs_files(repo_id, [operation], free_memory=False, **place)
        commit = {"commit_message": commit_message, "parent_commit": head.sha, **place}
        try:
            return api.create_commit(repo_id, [*plan.adds, *plan.copies, *plan.deletions], **commit)
        except (HfHubHTTPError, ValueError) as error:  # ValueError: files in the Hub's older storage
            response = getattr(error, "response", None)
            if not plan.copies or (response is not None and response.status_code in (401, 409, 412)):
                raise
            logger.warning(f"The Hub does not copy from {source} ({error}); sending {len(plan.copies)} files instead.")
            names = [operation.path_in_repo for operation in (*plan.adds, *plan.copies)]
            adds = [CommitOperationAdd(name, files[name]) for name in names]
            return api.create_commit(repo_id, [*adds, *plan.deletions], **commit)


@contextlib.contextmanager
def explain_refusals(repo_id: str) -> Iterator[None]:
    """Add to the Hub's refusals what to do about them.

    Raises:
        RuntimeError: in one line, instead of an `HfHubHTTPError`, or where the Hub can't be reached at all.
    """
    hints = {
        401: "Log in with `hf auth login`, or pass a token.",
        403: "The token may not write there; use one with write access to that namespace.",
        409: "Someone else changed it meanwhile; push again.",
        412: "Someone else changed it meanwhile; push again.",
    }
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise RuntimeError(
            f"The Hub refused the push to `{repo_id}` ({status}): {error}. "
            + hints.get(status or 0, "Files that arrived are kept; push again.")
        ) from error
    except LocalTokenNotFoundError as error:
        raise RuntimeError(f"The push to `{repo_id}` needs a token. {hints[401]}") from error
    except Exception as error:
        # What says that there is no connection is of the HTTP library, and huggingface_hub has changed that.
        offline = isinstance(error, OfflineModeIsEnabled)
        if not offline and not type(error).__module__.startswith("http"):
            raise
        reason = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RuntimeError(
            f"The Hub can't be reached for `{repo_id}` ({reason}). What is on disk stays: push it later, with "
            "`fedlpp-hf push` or `trainer.push_to_hub()`."
        ) from error


def open_repository(destination: Destination, source: str | None) -> str:
    """The repository's id with its namespace. It is created if it does not exist, private unless `destination` says otherwise.

    Args:
        destination: the repository.
        source: the full model on the Hub; None if it is not there.

    Raises:
        ValueError: if the repository is, or would be, public against `destination`.
        RuntimeError: if the Hub refuses, or can't be reached.
    """
    api = HfApi(token=destination.token)
    with explain_refusals(destination.repo_id):
        confidential = source is None or bool(api.model_info(source).private)
        return _open_repository(api, destination, confidential).id


def _open_repository(api: HfApi, destination: Destination, confidential: bool) -> Any:
    """The state of the repository's branch; repository and branch are created if they do not exist."""
    repo_id = destination.repo_id
    if not destination.private:
        _check_public(destination, confidential)
    if "/" not in repo_id:  # of one's own namespace; without one the Hub would look among its oldest models
        repo_id = api.create_repo(repo_id, private=destination.private, exist_ok=True).repo_id
    try:
        head = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=destination.private, exist_ok=True)
        head = api.model_info(repo_id, files_metadata=True)
    if not head.private:
        _check_public(destination, confidential)
    if destination.revision is not None and not destination.create_pr:
        try:
            head = api.model_info(repo_id, revision=destination.revision, files_metadata=True)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=destination.revision)
            head = api.model_info(repo_id, revision=destination.revision, files_metadata=True)
    return head


def _plan_commit(files: Mapping[str, Path], head: Any, source: str | None, source_info: Any) -> _Plan:
    present = {sibling.rfilename: sibling for sibling in head.siblings or []}
    at_source = {sibling.rfilename: sibling for sibling in source_info.siblings or []} if source else {}
    plan = _Plan([], [], [])
    for name, path in files.items():
        if _is_same(path, present.get(name)):
            continue
        if _is_same(path, at_source.get(name)):
            plan.copies.append(CommitOperationCopy(name, name, source_info.sha, source, "model"))
        else:
            plan.adds.append(CommitOperationAdd(name, path))
    plan.deletions.extend(
        CommitOperationDelete(name) for name in present if name.endswith(_WEIGHTS) and name not in files
    )
    return plan


def _check_public(destination: Destination, confidential: bool) -> None:
    if confidential and not destination.allow_public:
        raise ValueError(
            f"`{destination.repo_id}` is or would be public, but the full model is not known to be. Push to a private "
            "repository, or pass allow_public=True (--allow_public) if the owner's weights may be published."
        )


def _is_same(path: Path, stored: Any) -> bool:
    """Whether a large file on the Hub has these bytes; huggingface_hub itself compares small ones."""
    if stored is None or stored.lfs is None or stored.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == stored.lfs.sha256
