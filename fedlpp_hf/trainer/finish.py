# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What comes after the last round: the report, callbacks, the merge, the audit, the references."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..audit.exposed import list_sent
from ..report.rounds import RoundReporter
from ..report.sent import SentTensor
from ..tensors.codebooks import FULL_PRECISION
from .publishing import MERGED_DIR


if TYPE_CHECKING:
    from ..audit.report import AuditReport

logger = logging.get_logger(__name__)


def finish_federation(trainer: Any, records: Sequence[dict[str, Any]], reporter: RoundReporter) -> None:
    """Write the report, tell callbacks, merge, audit and run the references, and write the report again with what these add.

    Whatever fails, the rounds are committed and the report is there; each part runs though another one failed.

    Args:
        trainer: A [`FederatedMixin`] trainer after its rounds.
        records: Of all rounds.
        reporter: Of the run.

    Raises:
        Exception: what failed first, when the others have run.
        ValueError: if the audit's share is above `audit_threshold`.
    """
    args, owner, state = trainer.args, trainer.owner, trainer.server.state
    audit: AuditReport | None = None
    references: dict[str, dict[str, Any]] = {}
    sent: list[SentTensor] = []
    problems: list[Exception] = []

    def write_report() -> None:
        reporter.write(records, references, audit.summarize() if audit else None, sent)

    with _collect(problems):
        # Of a base in memory there is no manifest that says what its tensors hold.
        if trainer.blueprint.base_dir or args.base_bits == FULL_PRECISION:
            sent = list_sent(trainer)
    write_report()
    with _collect(problems):
        trainer.rounds.end()  # callbacks are the user's, and may fail like all that comes here
    trainer.guard.prove_base_unmoved()
    with _collect(problems):
        if owner is not None and args.merge:
            owner.merge(args.output_dir, Path(args.output_dir) / MERGED_DIR, state.base_weight)
    with _collect(problems):
        if state.base_weight:  # what the merged model lost of W's precision, and may be paid for elsewhere
            label = f"server's model without its adapter (λ = {state.base_weight:g})"
            references[label] = owner.evaluate(owner.initial_adapter(), None, state.base_weight)
            write_report()
    with _collect(problems):
        if args.audit:
            from ..audit.audit import audit_federation  # many modules, which few federations need

            audit = audit_federation(trainer)
            audit.write(args.output_dir)
            write_report()
    with _collect(problems):
        if owner is not None and args.compare_full_precision:
            references["federation in full precision"] = owner.run_reference()
            if owner.has_rows:
                references["owner's own rows alone"] = owner.run_reference(own_rows=True)
    if references:
        write_report()
    reporter.show()
    for problem in problems[1:]:
        logger.error(f"After the error that follows, this failed, too: {type(problem).__name__}: {problem}")
    if problems:
        raise problems[0]
    if audit is not None:
        audit.check_threshold()


@contextmanager
def _collect(problems: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problems.append(error)
