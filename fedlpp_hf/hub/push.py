# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Push a merged model or an adapter to the Hub: private by default, and never a client's files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard

from ..server.store import FEDERATION_DIR
from ..tensors.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .card import CARD, write_model_card
from .merged_model import check_merged
from .upload import Destination, explain_refusals, upload_files


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
    """Upload a merged model with a model card in one commit.

    Files that the repository already has are not sent again. Files identical to those of `source` on the Hub are copied
    there. After an interruption, a repeated push does not resend the shards that arrived.

    Args:
        directory: the merged model.
        repo_id: repository; created if it does not exist.
        source: the full model (directory or Hub id); its card's licence and tags are kept.
        private: create the repository as private. An existing public one also needs `allow_public`.
        allow_public: allow a public repository although the source is not public.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead.
        federation_dir: the federation's `output_dir`, for the card.
        audit: Markdown or JSON of a privacy audit, for the card; by default the federation's.
        commit_message: of the commit.
        token: of the Hub; by default the one of this machine.

    Raises:
        ValueError: if the directory is not a merged model, contains a client's view or a federation, or would become
            public.
        RuntimeError: if the Hub refuses; the message says what to do.
    """
    directory = Path(directory)
    check_merged(directory)
    with explain_refusals(repo_id):
        write_model_card(directory, repo_id, source=source, federation_dir=federation_dir, audit=audit, token=token)
    files = {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts[:1])
    }
    destination = Destination(repo_id, private, allow_public, revision, create_pr, token)
    return _upload(files, destination, source, commit_message)


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
    metadata: Mapping[str, Any] | None = None,
    commit_message: str = "Adapter of a federation",
    token: str | None = None,
) -> CommitInfo:
    """Upload the server's adapter with a model card, and no other file.

    Args:
        directory: a federation's `output_dir`, or another PEFT repository.
        repo_id: repository; the other arguments and the errors are those of [`push_merged`].
        metadata: for the card, in place of the full model's.
    """
    directory = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"`{directory}` has no `{name}`; expected the output_dir of a federation.")
    federation = directory if (directory / FEDERATION_DIR).is_dir() else None
    with explain_refusals(repo_id):
        write_model_card(
            directory, repo_id, source=source, federation_dir=federation, audit=audit, token=token, metadata=metadata
        )
    files = {name: directory / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD)}
    destination = Destination(repo_id, private, allow_public, revision, create_pr, token)
    return _upload(files, destination, source, commit_message)


def _upload(
    files: dict[str, Path], destination: Destination, source: str | os.PathLike | None, commit_message: str
) -> CommitInfo:
    with explain_refusals(destination.repo_id):
        try:
            ModelCard.load(files[CARD], ignore_metadata_errors=True).validate()
        except ValueError as error:  # better now than after gigabytes are sent
            raise ValueError(
                f"The Hub does not accept the model card ({error}). Correct the full model's card: its metadata are kept."
            ) from error
    on_hub = None if source is None or Path(source).is_dir() else str(source)
    return upload_files(files, destination, on_hub, commit_message)
