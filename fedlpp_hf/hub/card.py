# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The model card of a merged model or an adapter: what it is, how it was made, its results, its privacy."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from ..config.groups import FederationOptions
from ..config.options import card_labels
from ..report.tables import format_table
from ..report.text import NOT_MEASURED, list_remarks, list_results
from ..server.store import RoundStore
from .metadata import read_metadata
from .snippet import describe_loading


CARD = "README.md"
_TAGS = ("fedlpp_hf", "federated-learning", "lora")
# The metadata of the full model's card that also hold for the fine-tuned model.
_KEPT = (
    "license", "license_name", "license_link", "language", "tags", "datasets", "pipeline_tag", "extra_gated_prompt",
    "extra_gated_fields",
)  # fmt: skip


def write_model_card(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    source: str | os.PathLike | None = None,
    federation_dir: str | os.PathLike | None = None,
    audit: str | os.PathLike | None = None,
    token: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write `README.md` into a directory and return its path. The card says so where something is unknown.

    Args:
        directory: a merged model or a PEFT repository.
        repo_id: the repository for which the card is.
        source: the full model (directory or Hub id); licence, languages and tags are those of its card.
        federation_dir: the federation's `output_dir`: rounds, clients, bits and all tables of `report.md`.
        audit: Markdown or JSON of a privacy audit; by default `audit.md` or `audit.json` in `federation_dir`.
        token: of the Hub; by default the one of this machine.
        metadata: in place of the full model's; tags are added.

    Raises:
        ValueError: if one of these files can't be read.
    """
    directory = Path(directory)
    data = read_source_card(source, directory, token) | {"library_name": "transformers"}
    is_adapter = (directory / "adapter_config.json").is_file()
    if is_adapter:
        data["library_name"] = "peft"
    data["tags"] = list(dict.fromkeys([*data.get("tags", []), *_TAGS]))
    if source is not None and not Path(source).is_dir():
        data["base_model"], data["base_model_relation"] = str(source), "adapter" if is_adapter else "finetune"
    if metadata:
        data |= dict(metadata) | {"tags": list(dict.fromkeys([*metadata.get("tags", []), *data["tags"]]))}
    federation = Path(federation_dir) if federation_dir is not None else None
    parts = [
        f"# {repo_id.rsplit('/', 1)[-1]}",
        _describe(is_adapter, data.get("base_model")),
        "## How it was made\n\n" + _describe_federation(federation),
        "## Results\n\n" + _read_results(federation),
        "## Privacy\n\n" + _describe_privacy(federation, audit),
        "## How to load\n\n" + describe_loading(directory, repo_id, source, federation),
    ]
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    card.save(directory / CARD)
    return directory / CARD


def read_source_card(source: str | os.PathLike | None, directory: Path, token: str | None = None) -> dict[str, Any]:
    """The metadata of the full model's card to keep; empty without a card.

    Args:
        source: the full model (directory or Hub id).
        directory: where a card is looked for without `source`.
        token: of the Hub; by default the one of this machine.

    Raises:
        ValueError: if the metadata are not valid.
    """
    from huggingface_hub.errors import EntryNotFoundError

    if source is None or Path(source).is_dir():
        card = (Path(source) if source is not None else directory) / CARD
        if not card.is_file():
            return {}
    else:
        try:
            card = Path(hf_hub_download(str(source), CARD, token=token))
        except EntryNotFoundError:
            return {}
    try:
        metadata = read_metadata(card)
    except (OSError, ValueError) as error:
        place = card if source is None or Path(source).is_dir() else source
        raise ValueError(f"The model card of `{place}` can't be read: {error}. Correct its metadata.") from error
    return {key: metadata[key] for key in _KEPT if metadata.get(key)}


def _describe(is_adapter: bool, base_model: str | None) -> str:
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its owner's full-precision model"
    what = (
        f"A LoRA adapter for {of}"
        if is_adapter
        else f"{of[0].upper() + of[1:]} with a LoRA adapter merged into its full-precision weights"
    )
    return (
        f"{what}, trained by federated learning with `fedlpp_hf`: clients trained quantized adapters on a quantized copy of "
        "the model, and their data did not leave them. It builds on [FedLPP](https://arxiv.org/abs/2406.10976)."
    )


def _read_federation(federation: Path | None) -> Mapping[str, Any] | None:
    """What the federation began with; None where there is none, such as before training."""
    store = None if federation is None else RoundStore(federation)
    return store.read() if store is not None and store.exists else None


def _describe_federation(federation: Path | None) -> str:
    state = _read_federation(federation)
    if state is None or federation is None:
        return "The federation's records were not available when this card was written."
    config, clients = state["config"], state.get("clients") or {}
    rows = [
        f"| {label} | {config[key]} |"
        for key, label in card_labels(FederationOptions).items()
        if config.get(key) is not None
    ]
    done = RoundStore(federation).latest()
    rows += [f"| rounds done | {done} |", f"| clients | {len(clients)} |"]
    # A stream has no known number of rows; an exact number would tell what noise must hide.
    if clients and None not in clients.values() and not _is_noisy(federation):
        rows.append(f"| examples of all clients | {sum(clients.values())} |")
    rows += [f"| {name} | {version} |" for name, version in state.get("packages", {}).items()]
    return "| setting | value |\n|---|---|\n" + "\n".join(rows)


def _read_results(federation: Path | None) -> str:
    if federation is not None and _is_noisy(federation):
        return _list_noisy_results(federation)
    report = None if federation is None else federation / "report.md"
    if report is None or not report.is_file():
        return "The federation's report was not available when this card was written."
    # Two levels down, below this section's heading.
    lines = [f"##{line}" if line.startswith("#") else line for line in report.read_text(encoding="utf-8").splitlines()]
    return "\n".join(lines).strip()


def _is_noisy(federation: Path) -> bool:
    """Whether client-level differential privacy is on: what of the clients has no noise is then left out of a card."""
    config = (_read_federation(federation) or {}).get("config", {})
    return any(config.get(name) is not None for name in ("target_epsilon", "noise_multiplier"))


def _list_noisy_results(federation: Path) -> str:
    """The report without what comes from clients and has no noise: their losses and numbers, attackers, references."""
    store = RoundStore(federation)
    config: Any = SimpleNamespace(**store.read()["config"])
    records = store.records()
    if not records:
        return "No round was done when this card was written."
    table = list_results(records, config)
    lines = [*(format_table(table) if table else [NOT_MEASURED]), f"\n{len(records) - 1} rounds."]
    return "\n".join([*lines, *(f"\n{remark}" for remark in list_remarks(records, config))])


def _describe_privacy(federation: Path | None, audit: str | os.PathLike | None) -> str:
    state = _read_federation(federation)
    parts = []
    if state is not None:
        config = state["config"]
        parts.append(
            f"Clients held a base of {config.get('base_bits', '?')} bits per weight and adapters of "
            f"{config.get('adapter_bits', '?')} bits per value, never the full-precision weights; the owner received "
            "updates of the adapter, never data."
        )
    found = Path(audit) if audit is not None else None
    if audit is None and federation is not None and _is_noisy(federation):
        parts.append(
            "Clients' losses and numbers of rows, references and the audit are left out here: they are computed from clients' rows "
            "without noise."
        )
        return "\n\n".join(parts)
    if audit is None and federation is not None:
        places = [federation / "audit.md", federation / "audit.json"]
        found = next((path for path in places if path.is_file()), None)
    if found is None:
        parts.append(
            "No privacy audit was run on this model. It was not measured how much of the model clients could rebuild, or how "
            "much the updates reveal about their data."
        )
        return "\n\n".join(parts)
    try:
        text = found.read_text(encoding="utf-8")
        if found.suffix == ".json":
            text = "```json\n" + json.dumps(json.loads(text), indent=2) + "\n```"
    except (OSError, ValueError) as error:
        raise ValueError(f"The audit `{found}` can't be read ({error}).") from error
    text = "\n".join(f"##{line}" if line.startswith("#") else line for line in text.splitlines())
    return "\n\n".join([*parts, "Results of the audit:", text.strip()])
