# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A model's repository on the Hub at one commit: sizes of files, ranges of their bytes, downloads that go on."""

import os
import time
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from .shards import WEIGHTS_INDEX


_ATTEMPTS = 5


class HubUnreachable(Exception):
    """The Hub does not answer; the message says how."""


class HubRepository:
    """A model on the Hub, at the commit that `revision` names now.

    `directory` is its place in the Hub's cache, with the configuration and the index of the shards; `sizes` has the bytes
    of all files.

    Raises:
        ValueError: if there is no such model.
        HubUnreachable: if the Hub does not answer.
    """

    def __init__(self, name: str, revision: str | None = None, token: str | None = None):
        self.name, self.token = name, token
        small = ["config.json", WEIGHTS_INDEX]
        try:
            # With the revision as it was given, the cache remembers its commit for later use without the Hub.
            self.directory = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=small))
            self.commit = self.directory.name
            info = HfApi(token=token).model_info(name, revision=self.commit, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise ValueError(f"`{name}` is neither a directory nor a model on the Hub ({error}).") from error
        except (HTTPError, LocalEntryNotFoundError) as error:
            if isinstance(error, HfHubHTTPError) and error.response is not None:
                raise
            raise HubUnreachable(str(error)) from error
        self.sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def download_files(self, allow: list[str] | None = None, ignore: list[str] | None = None) -> None:
        """Download the files that match patterns into `directory`."""
        snapshot_download(
            self.name, revision=self.commit, token=self.token, allow_patterns=allow, ignore_patterns=ignore
        )

    def download_shard(self, file: str, directory: Path | None = None) -> Path:
        """Download one file to the Hub's cache, or to `directory`. A download that broke off goes on where it was.

        Raises:
            RuntimeError: if the Hub refuses, or fails five times.
        """
        for attempt in range(_ATTEMPTS):
            try:
                path = hf_hub_download(
                    self.name, file, revision=self.commit, token=self.token, local_dir=directory, dry_run=False
                )
                return Path(path)
            except HTTPError as error:
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if refused or attempt == _ATTEMPTS - 1:
                    raise RuntimeError(
                        f"`{file}` of `{self.name}` could not be downloaded ({error}). Nothing was written; try again."
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def read_range(self, file: str, start: int, length: int) -> bytes:
        """Read bytes of a file without downloading the rest.

        Raises:
            RuntimeError: if the Hub refuses.
        """
        headers = build_hf_headers(token=self.token) | {"Range": f"bytes={start}-{start + length - 1}"}
        try:
            response = http_backoff(
                "GET", hf_hub_url(self.name, file, revision=self.commit), headers=headers, follow_redirects=True
            )
            hf_raise_for_status(response)
        except HTTPError as error:
            raise RuntimeError(f"The header of `{file}` of `{self.name}` could not be read ({error}).") from error
        data = response.content
        # A server without ranges answers with the whole file.
        return data if response.status_code == 206 else data[start : start + length]


def find_in_cache(name: str | os.PathLike, revision: str | None = None, reason: str = "HF_HUB_OFFLINE is set") -> Path:
    """The directory of a model that was downloaded before, without asking the Hub.

    Args:
        name: of the model.
        revision: branch, tag or commit.
        reason: why the Hub is not asked, for the error.

    Raises:
        ValueError: if it was not.
    """
    try:
        # Only the configuration has to be there: who downloads a model leaves out pickles and pictures.
        config = ["config.json"]
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True, allow_patterns=config))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"`{name}` is neither a directory nor in the Hub's cache, and {reason}. Give a directory, or let the Hub be "
            "asked."
        ) from error


def find_missing(name: str, revision: str | None, ignore: list[str]) -> str | None:
    """What the Hub's cache does not have of a model, as huggingface_hub says it; None if it has all or does not know.

    Args:
        name: of the model.
        revision: branch, tag or commit.
        ignore: patterns of files that may be missing.
    """
    try:
        snapshot_download(name, revision=revision, local_files_only=True, ignore_patterns=ignore)
    except LocalEntryNotFoundError as error:
        return str(error)
    return None
