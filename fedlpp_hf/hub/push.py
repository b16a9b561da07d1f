# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Put a merged model, or an adapter, on the Hub: private unless told otherwise, and never what belongs to a client."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import sha_fileobj
from transformers.utils import logging

from ..base.shards import read_shards
from ..merge.destination import VIEW_MARK
from ..server.store import FEDERATION_DIR
from ..tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .card import CARD, write_model_card


logger = logging.get_logger(__name__)

# What a client holds, or what holds a secret: TrainingArguments carry the Hub's token.
_NEVER_PUSHED = ("base_manifest.json", "task.safetensors", "update.safetensors", "training_args.bin")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def push_merged(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    source: str | os.PathLike | None = None,
    private: bool = True,
    allow_public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    federation_dir: str | os.PathLike | None = None,
    audit: str | os.PathLike | None = None,
    commit_message: str = "Merge a federated adapter into the full model",
    token: str | None = None,
) -> CommitInfo:
    """Upload a merged model to `repo_id`, with a model card, in one commit.

    A file that the repository already has is not sent again, nor is one that `source`, the full model, has on the Hub:
    it is copied there. Shards go up one by one, and those that arrived are not repeated when the push is.

    Args:
        source: the full model (directory or name on the Hub); its card's licence and tags are kept.
        private: of a repository that is created. One that exists and is public needs `allow_public`, too.
        allow_public: allow a public repository for a model whose source is not public itself.
        federation_dir: the federation's `output_dir`, for the card; `audit`: see [`write_model_card`].

    Raises:
        ValueError: if the directory is no merged model, holds a client's view or a federation, or would become public.
        RuntimeError: if the Hub refuses, saying what to do.
    """
    directory = Path(directory)
    _check_merged(directory)
    with _explain(repo_id):
        write_model_card(directory, repo_id, source=source, federation_dir=federation_dir, audit=audit, token=token)
    files = {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts[:1])
    }
    return _push(files, repo_id, source, private, allow_public, revision, create_pr, commit_message, token)


def push_adapter(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    source: str | os.PathLike | None = None,
    private: bool = True,
    allow_public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    audit: str | os.PathLike | None = None,
    commit_message: str = "Adapter of a federation",
    token: str | None = None,
) -> CommitInfo:
    """Upload the server's adapter in `directory`, a federation's `output_dir`, with a model card, and nothing else of it.

    Arguments and errors are those of [`push_merged`].
    """
    directory = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"`{directory}` has no `{name}`; expected the output_dir of a federation.")
    federation = directory if (directory / FEDERATION_DIR).is_dir() else None
    with _explain(repo_id):
        write_model_card(directory, repo_id, source=source, federation_dir=federation, audit=audit, token=token)
    files = {name: directory / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD)}
    return _push(files, repo_id, source, private, allow_public, revision, create_pr, commit_message, token)


def _check_merged(directory: Path) -> None:
    """Refuse what is not a whole merged model, or holds more than one."""
    if not directory.is_dir():
        raise ValueError(f"`{directory}` is no directory; expected a merged model.")
    if (directory / FEDERATION_DIR).exists():
        raise ValueError(
            f"`{directory}` has `{FEDERATION_DIR}`, a federation's state with what clients sent and hold. Push the "
            "directory that the merge wrote."
        )
    for name in _NEVER_PUSHED:
        if (directory / name).exists():
            raise ValueError(
                f"`{directory}` has `{name}`, which must not leave its holder. Is it a client's directory?"
            )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{directory / 'config.json'}` can't be read ({error}); expected a merged model.") from error
    if config.get("quantization_config") or config.get(VIEW_MARK):
        raise ValueError(
            f"`{directory}` is a quantized model, or one merged into its base: a client's view. Push the one that was merged "
            "into the full-precision weights."
        )
    read_shards(directory)  # every shard whole, and where the index says


def _push(
    files: Mapping[str, Path],
    repo_id: str,
    source: str | os.PathLike | None,
    private: bool,
    allow_public: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    token: str | None,
) -> CommitInfo:
    api = HfApi(token=token)
    origin = None if source is None or Path(source).is_dir() else str(source)
    with _explain(repo_id):
        try:
            ModelCard.load(files[CARD], ignore_metadata_errors=True).validate()
        except ValueError as error:  # known before gigabytes are sent
            raise ValueError(
                f"The Hub does not take the model card ({error}). Mend the full model's, whose metadata it keeps."
            ) from error
        source_info = api.model_info(origin, files_metadata=True) if origin else None
        confidential = source_info is None or bool(source_info.private)
        if not private:
            _check_public(repo_id, confidential, allow_public)
        try:
            head = api.model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
            head = api.model_info(repo_id, files_metadata=True)
        if not head.private:
            _check_public(repo_id, confidential, allow_public)
        if revision is not None and not create_pr:
            try:
                head = api.model_info(repo_id, revision=revision, files_metadata=True)
            except RevisionNotFoundError:
                api.create_branch(repo_id, branch=revision)
                head = api.model_info(repo_id, revision=revision, files_metadata=True)
        there = {sibling.rfilename: sibling for sibling in head.siblings or []}
        at_source = {sibling.rfilename: sibling for sibling in (source_info.siblings or [])} if source_info else {}
        if origin == repo_id:
            at_source = {}
        adds: list[Any] = []
        copies: list[Any] = []
        for name, path in files.items():
            if _is_same(path, there.get(name)):
                continue
            if source_info is not None and _is_same(path, at_source.get(name)):
                copies.append(CommitOperationCopy(name, name, source_info.sha, origin, "model"))
            else:
                adds.append(CommitOperationAdd(name, path))
        # A stale single file would be loaded before the new index.
        stale = [name for name in there if name.endswith(_WEIGHTS) and name not in files]
        deletions = [CommitOperationDelete(name) for name in stale]
        logger.info(
            f"{repo_id}: {len(adds)} files to send, {len(copies)} to copy from {origin}, {len(stale)} to delete."
        )
        place: dict[str, Any] = {"revision": None if create_pr else revision, "create_pr": create_pr}
        for operation in sorted(adds, key=lambda operation: operation.upload_info.size):
            # One by one: what has arrived is not sent again when the push is repeated.
            api.preupload_lfs_files(repo_id, [operation], free_memory=False, **place)
        commit = {"commit_message": commit_message, "parent_commit": head.sha, **place}
        try:
            return api.create_commit(repo_id, [*adds, *copies, *deletions], **commit)
        except (HfHubHTTPError, ValueError) as error:  # ValueError: files that the Hub keeps in its older storage
            response = getattr(error, "response", None)
            if not copies or (response is not None and response.status_code in (401, 409, 412)):
                raise
            logger.warning(f"The Hub does not copy from {origin} ({error}); sending {len(copies)} files instead.")
            sent = [CommitOperationAdd(operation.path_in_repo, files[operation.path_in_repo]) for operation in copies]
            adds = [CommitOperationAdd(operation.path_in_repo, files[operation.path_in_repo]) for operation in adds]
            return api.create_commit(repo_id, [*adds, *sent, *deletions], **commit)


def _check_public(repo_id: str, confidential: bool, allow_public: bool) -> None:
    if confidential and not allow_public:
        raise ValueError(
            f"`{repo_id}` is or would be public, but the full model is not known to be. Push to a private repository, or "
            "pass allow_public=True (--allow_public) if the owner's weights may be published."
        )


def _is_same(path: Path, remote: Any) -> bool:
    """Whether a large file of the Hub has these bytes; small ones are compared by huggingface_hub itself."""
    if remote is None or remote.lfs is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


@contextlib.contextmanager
def _explain(repo_id: str) -> Iterator[None]:
    """The Hub's refusals, with what to do about them."""
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
            + hints.get(status or 0, "What has arrived is kept; push again.")
        ) from error
