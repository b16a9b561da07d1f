# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Writing the merged shards, one after the other, while the next one is downloaded."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..base.full_model import FullModel
from ..tensors.threads import map_in_order, tensor_threads
from .copying import can_share_blocks
from .destination import check_room
from .jobs import Copy, Rewrite, ShardJobs
from .report import Norms
from .rows import RowProducer
from .sinks import FileComparer, FileWriter, Sink


def write_shards(
    work: Path,
    source: FullModel,
    shards: Mapping[str, ShardJobs],
    producer: RowProducer,
    *,
    threads: int | None = None,
    verify: bool = False,
    sync: bool = True,
) -> dict[str, Norms]:
    """Write all shards into a directory. Returns the norms by parameter.

    Args:
        work: the directory.
        source: the full model.
        shards: the jobs of each shard, by file name.
        producer: computes the new rows.
        threads: that read, compute and write; by default one per core.
        verify: compare each shard with what is computed a second time, after it was written.
        sync: wait until each shard is on disk.

    Raises:
        OSError: if there is too little room.
        ValueError: if a result is not finite.
        RuntimeError: if a shard is not what was written.
    """
    files = list(shards)
    check_room(work, _count_bytes(work, source, shards))
    norms: dict[str, Norms] = {}
    with tensor_threads(threads or os.cpu_count()) as pool, ThreadPoolExecutor(1) as downloads:
        coming = downloads.submit(source.fetch, files[0])
        for file, following in zip(files, [*files[1:], None], strict=True):
            path, jobs = coming.result(), shards[file]
            if following is not None:
                coming = downloads.submit(source.fetch, following)
            for parameter, found in merge_shard(path, jobs, producer, FileWriter(work / file, sync), pool).items():
                norms.setdefault(parameter, Norms()).add_(found)
            if verify:
                merge_shard(path, jobs, producer, FileComparer(work / file), pool)
            source.release(file)
    return norms


def merge_shard(
    source: Path, jobs: ShardJobs, producer: RowProducer, sink: Sink, pool: ThreadPoolExecutor
) -> dict[str, Norms]:
    """Compute one merged shard, and give all its bytes to a sink. Returns the norms by parameter.

    Args:
        source: the full model's shard.
        jobs: the shard's jobs.
        producer: computes the new rows.
        sink: takes the bytes.
        pool: the threads to work on.

    Raises:
        ValueError: if a result is not finite.
        OSError: as the sink does.
        RuntimeError: as the sink does.
    """
    norms: dict[str, Norms] = {}
    with open(source, "rb", buffering=0) as reader, sink:
        descriptor = reader.fileno()

        @torch.inference_mode()
        def run(job: Copy | Rewrite) -> Norms:
            found = Norms()
            if isinstance(job, Copy):
                sink.take_copy(descriptor, job)
            else:
                for first, rows in producer.produce(job, descriptor, found):
                    sink.take_rows(rows, job.to + first * job.row_bytes, job.tensor.name)
            sink.finish(job.to, job.length)
            return found

        todo: list[Copy | Rewrite] = [*sink.start(descriptor, jobs), *jobs.rewrites]
        todo.sort(key=lambda job: job.to)
        for job, found in zip(todo, map_in_order(pool, run, todo, limit=len(todo)), strict=True):
            if isinstance(job, Rewrite):
                norms.setdefault(job.piece.parameter, Norms()).add_(found)
    return norms


def _count_bytes(work: Path, source: FullModel, shards: Mapping[str, ShardJobs]) -> int:
    """The room that the result needs: less than its size where the file system shares blocks with the full model."""
    shared = source.is_local and can_share_blocks(source.fetch(next(iter(shards))), work)
    needed = sum(
        sum(job.length for job in jobs.rewrites) if shared and jobs.new is jobs.old else jobs.new.size
        for jobs in shards.values()
    )
    if source.scratch is not None:
        needed += 2 * max(shard.size for shard in source.shards.values())
    return needed
