# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a federated trainer saves and pushes: the server's adapter and the merged model, and never a client's view."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..hub.card import write_model_card
from ..hub.push import push_adapter
from ..hub.upload import Destination, open_repository
from ..server.store import FEDERATION_DIR, RoundStore
from ..tensors.adapters import write_adapter


# For type checkers the mixin is the Trainer that it will be mixed with.
_Parent: Any = Trainer if TYPE_CHECKING else object

# The underscore keeps it out of `push_to_hub` of the adapter.
MERGED_DIR = "_merged"  # the full model with the server's adapter merged into it
# What `create_model_card` takes in Transformers and in TRL.
_CARD_ARGUMENTS = (
    "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset", "dataset_args",
    "dataset_name",
)  # fmt: skip
_PUSH_ARGUMENTS = ("private", "allow_public", "revision", "create_pr", "audit", "source")


class PublishingMixin(_Parent):
    """The part of [`FederatedMixin`] that faces the Hub."""

    owner: Any
    server: Any
    guard: Any

    def evaluate_server(self) -> dict[str, Any]:
        """Metrics of the server's model, W − λE + θ, on `eval_dataset`: what the owner has. `evaluate` measures what a client has.

        Raises:
            ValueError: if no owner's process holds the full model, or there is no evaluation dataset.
        """
        if not self.is_world_process_zero():
            return {}
        if self.owner is None or not self.evaluates:
            missing = "full_model" if self.owner is None else "eval_dataset"
            raise ValueError(
                f"Only the owner's process can evaluate the server's model, and `{missing}` is not set. Pass it when "
                "the trainer is made."
            )
        if self.server is None:
            return self.owner.evaluate(self.owner.initial_adapter())
        state = self.server.state
        return self.owner.evaluate(state.adapter, state.residual, state.base_weight)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the server's adapter and the tokenizer: what the live model holds is a client's view of the adapter.

        Raises:
            ValueError: if it would put an untrained adapter in the place of a federation's.
        """
        if self.is_world_process_zero():
            store = RoundStore(self.args.output_dir)
            directory = Path(output_dir or self.args.output_dir)
            own = directory.resolve() == store.output_dir.resolve()
            if self.server is None and own and store.latest():
                raise ValueError(
                    f"`{directory}` has the adapter of a federation of {store.latest()} rounds, and this trainer has trained "
                    "none. Call train(resume_from_checkpoint=True) first, or push what is there with `fedlpp-hf push`."
                )
            untrained = (self.guard.initial, self.guard.peft_config)
            adapter, config = untrained if self.server is None else self.server.merged_adapter()
            directory.mkdir(parents=True, exist_ok=True)
            if own:
                store.publish(adapter, config)  # whole or not at all
            else:
                write_adapter(directory, adapter, config)
            processor: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if hasattr(processor, "save_pretrained"):
                processor.save_pretrained(directory)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of the adapter, or check the one that is there, before anything is trained.

        It is private, unless `private` or `args.hub_private_repo` is False.

        Raises:
            ValueError: if it is, or would be, public, and the full model is not.
            RuntimeError: if the Hub refuses, or can't be reached.
        """
        if self.is_world_process_zero():
            self.hub_model_id = self._open_repository({"private": private}, token)
            self.push_in_progress = None

    def create_model_card(self, **kwargs: Any) -> None:
        """Write the model card, `README.md`, to `output_dir`: how the adapter was made, its results, its privacy.

        Args:
            language, license, tags, model_name, tasks, dataset, dataset_tags, dataset_name: as in Transformers and TRL.
            finetuned_from: the full model, if it is on the Hub; a path is left out.
            dataset_args: taken for Transformers' sake; the card has no place for them.

        Raises:
            ValueError: for any other argument.
        """
        if unknown := kwargs.keys() - set(_CARD_ARGUMENTS):
            raise ValueError(
                f"create_model_card has no argument {sorted(unknown)[0]!r}; expected {', '.join(_CARD_ARGUMENTS)}."
            )
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir)
            write_model_card(
                directory,
                str(kwargs.get("model_name") or self._repository_name()),
                source=self.args.full_model or None,
                federation_dir=directory if (directory / FEDERATION_DIR).is_dir() else None,
                token=self.args.hub_token,
                metadata=_make_metadata(kwargs),
            )

    def push_to_hub(
        self, commit_message: str | None = None, blocking: bool = True, token: str | None = None, **kwargs: Any
    ) -> Any:
        """Push the server's adapter with its model card to `args.hub_model_id`, and nothing else of `output_dir`.

        It becomes private unless `private` or `args.hub_private_repo` is False.

        Args:
            commit_message: Of the commit.
            blocking: Must be True.
            token: Of the Hub; by default `args.hub_token`, or the one of this machine.
            kwargs: Those of [`push_adapter`] and of [`create_model_card`].

        Raises:
            ValueError: if the repository is or would be public without `allow_public`, `blocking` is False, or an argument is
                unknown.
            RuntimeError: if the Hub refuses, or can't be reached.
        """
        if not blocking:
            raise ValueError("blocking=False: the push is checked as it goes; it can't go on in the background.")
        card = {name: kwargs.pop(name) for name in _CARD_ARGUMENTS if name in kwargs}
        if unknown := kwargs.keys() - set(_PUSH_ARGUMENTS):
            raise ValueError(
                f"push_to_hub has no argument {sorted(unknown)[0]!r}; expected {', '.join(_PUSH_ARGUMENTS)}, or those of "
                f"create_model_card."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.hub_model_id = self._open_repository(kwargs, token)
        return push_adapter(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message or "Adapter of a federation",
            token=token or self.args.hub_token,
            metadata=_make_metadata(card),
            **self._hub_options({"source": self.args.full_model or None} | kwargs),
        )

    def merge_and_push(self, repo_id: str, **kwargs: Any) -> str:
        """Merge the server's adapter into the full model and push that to `repo_id`; returns the commit's address.

        The owner's process does both; `kwargs` are those of [`push_merged`].

        Raises:
            ValueError: if there is no full model, or it may not become public.
        """
        if self.owner is None:
            raise ValueError("No owner's process can merge here; set `full_model`, or use `fedlpp-hf merge --push`.")
        self.save_model(_internal_call=True)
        merged = Path(self.args.output_dir) / MERGED_DIR
        self.owner.merge(self.args.output_dir, merged, 0.0 if self.server is None else self.server.state.base_weight)
        return self.owner.push_merged(
            merged, repo_id, federation_dir=str(self.args.output_dir), **self._hub_options(kwargs)
        )

    def _repository_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _open_repository(self, options: dict[str, Any], token: str | None) -> str:
        options = self._hub_options(options)
        destination = Destination(
            self._repository_name(),
            private=options["private"],
            allow_public=bool(options.get("allow_public")),
            token=token or self.args.hub_token,
        )
        source = options.get("source") or self.args.full_model
        return open_repository(destination, None if not source or Path(source).exists() else str(source))

    def _hub_options(self, options: dict[str, Any]) -> dict[str, Any]:
        private = self.args.hub_private_repo if options.get("private") is None else options["private"]
        return options | {
            "private": private is None or bool(private),
            "revision": options.get("revision") or self.args.hub_revision,
        }


def _make_metadata(arguments: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a card from the arguments that Transformers' and TRL's `create_model_card` take."""

    def as_list(name: str) -> list[str]:
        value = arguments.get(name)
        return [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []

    datasets = as_list("dataset_tags") or as_list("dataset_name") or as_list("dataset")
    source = arguments.get("finetuned_from")
    found = {
        "language": arguments.get("language"),
        "license": arguments.get("license"),
        "tags": as_list("tags"),
        "datasets": datasets,
        "pipeline_tag": next(iter(as_list("tasks")), None),
        "base_model": None if source is None or Path(source).exists() or Path(source).is_absolute() else str(source),
    }
    return {name: value for name, value in found.items() if value}
