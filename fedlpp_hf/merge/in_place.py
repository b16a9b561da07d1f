# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Patch an existing copy of the full model, with an undo file written first."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from .editor import Copy, Editor, Rewrite
from .full_model import UNDO_DIR, UNDO_STATE, FullModel, refuse_interrupted
from .jobs import plan_jobs, run_jobs, start_workers, verify_shard
from .shards import Shard, change_layout, copy_range, read_shard, sync_file, write_range


_EMPTY = Shard("", b"\x02\0\0\0\0\0\0\0{}", {}, 10)


def patch_model_(
    directory: Path, source: FullModel, layouts: Mapping[str, Shard], editor: Editor, threads: int | None, verify: bool
) -> list[Rewrite]:
    """Merge into the files of `directory`, a copy of `source` or the source itself; returns what was rewritten.

    The tensors that change are saved under `_merge_undo` first; [`undo_merge_`] puts them back, and does so by itself if
    anything fails short of the process being killed.

    Raises:
        ValueError: if the directory is no plain copy of the source, or tensors would have to be added or resized.
    """
    check_patchable(directory, source, layouts)
    planned: dict[str, tuple[list[Copy], list[Rewrite]]] = {
        file: plan_jobs(source.shards[file], new, editor) for file, new in layouts.items()
    }
    _write_undo(directory, source, {file: rewrites for file, (_, rewrites) in planned.items()})
    itself = source.is_local and source.directory is not None and source.directory.samefile(directory)
    try:
        with start_workers(threads) as pool:
            for file, (copies, rewrites) in planned.items():
                if not rewrites:
                    continue
                path = source.fetch(file)
                with open(path, "rb", buffering=0) as reader, open(directory / file, "r+b", buffering=0) as writer:
                    run_jobs(rewrites, editor, reader.fileno(), writer.fileno(), pool)
                sync_file(directory / file)
                if verify and itself:
                    # What was there is only in the undo file; every other byte was not written to.
                    saved = read_shard(directory / UNDO_DIR / file)
                    _, again = plan_jobs(saved, _only(layouts[file], saved), editor)
                    verify_shard(directory / UNDO_DIR / file, directory / file, layouts[file], [], again, editor, pool)
                elif verify:
                    verify_shard(path, directory / file, layouts[file], copies, rewrites, editor, pool)
    except BaseException:
        undo_merge_(directory)
        raise
    _write_state(directory, complete=True)
    return [rewrite for _, rewrites in planned.values() for rewrite in rewrites]


def undo_merge_(directory: str | os.PathLike) -> None:
    """Put back what the last merge in place into `directory` changed, whether it was interrupted or not.

    Raises:
        ValueError: if there is nothing to undo.
    """
    directory = Path(directory)
    undo = directory / UNDO_DIR
    if not undo.is_dir():
        raise ValueError(f"`{directory}` has no `{UNDO_DIR}`; there is no merge in place to undo.")
    if (undo / UNDO_STATE).is_file():  # otherwise it was interrupted before anything was patched
        _write_state(directory, complete=False)
        for path in sorted(undo.glob("*.safetensors")):
            saved, patched = read_shard(path), read_shard(directory / path.name)
            with open(path, "rb", buffering=0) as reader, open(directory / path.name, "r+b", buffering=0) as writer:
                for name, tensor in saved.tensors.items():
                    to = patched.tensors[name].start
                    copy_range(reader.fileno(), writer.fileno(), tensor.start, tensor.stop - tensor.start, to)
            sync_file(directory / path.name)
    shutil.rmtree(undo)


def check_patchable(directory: Path, source: FullModel, layouts: Mapping[str, Shard]) -> None:
    """Refuse what can't be patched, or must not be written to.

    Raises:
        ValueError: saying why.
    """
    refuse_interrupted(directory)
    if (directory / UNDO_DIR / UNDO_STATE).is_file():
        raise ValueError(
            f"`{directory}` holds a merge in place already. Undo it with `undo_merge_`, or accept it by removing "
            f"`{UNDO_DIR}`; patching twice would add both updates."
        )
    present = FullModel(directory)
    for file, new in layouts.items():
        if new is not source.shards[file]:
            raise ValueError(
                f"The merge adds or resizes tensors in `{file}`, which can't be patched. Merge to a new copy."
            )
        path = directory / file
        if file not in present.shards or present.shards[file].header != new.header:
            raise ValueError(f"`{path}` is no copy of the full model's `{file}`: its header differs.")
        if path.is_symlink() or directory.is_symlink() or path.stat().st_nlink > 1:
            raise ValueError(
                f"`{path}` is a link, as in the Hub's cache; writing through it would change another copy. Merge to a "
                "new directory."
            )
        if not os.access(path, os.W_OK):
            raise ValueError(f"`{path}` is read-only; merge to a new directory.")


def _write_undo(directory: Path, source: FullModel, rewrites: Mapping[str, Sequence[Rewrite]]) -> None:
    undo = directory / UNDO_DIR
    shutil.rmtree(undo, ignore_errors=True)  # of a merge that was killed before it patched anything
    names = {file: sorted({job.tensor.name for job in jobs}) for file, jobs in rewrites.items() if jobs}
    needed = sum(t.stop - t.start for file in names for t in map(source.shards[file].tensors.__getitem__, names[file]))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(28, f"The undo file needs {needed / 1e9:.2f} GB in `{directory}`; {free / 1e9:.2f} GB are free.")
    undo.mkdir()
    for file, tensors in names.items():
        present = source.shards[file].tensors
        saved = change_layout(_EMPTY, {name: (present[name].dtype, present[name].shape) for name in tensors})
        with open(directory / file, "rb", buffering=0) as reader, open(undo / file, "xb", buffering=0) as writer:
            write_range(writer.fileno(), saved.header, 0)
            for name in tensors:
                start, length = present[name].start, present[name].stop - present[name].start
                copy_range(reader.fileno(), writer.fileno(), start, length, saved.tensors[name].start)
        sync_file(undo / file)
    sync_file(undo)
    _write_state(directory, complete=False)


def _write_state(directory: Path, complete: bool) -> None:
    state = directory / UNDO_DIR / UNDO_STATE
    temporary = state.with_suffix(".tmp")
    temporary.write_text(json.dumps({"complete": complete}))
    sync_file(temporary)
    os.replace(temporary, state)
    sync_file(state.parent)


def _only(shard: Shard, saved: Shard) -> Shard:
    """The part of a shard that was saved."""
    return Shard(shard.file, shard.header, {name: shard.tensors[name] for name in saved.tensors}, shard.size)
