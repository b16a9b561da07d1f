# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a federated trainer saves and pushes: the server's adapter and the merged model, and never a client's view."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..hub.push import push_adapter
from ..server.store import RoundStore


# For type checkers the mixin is the Trainer that it will be mixed with.
_Parent: Any = Trainer if TYPE_CHECKING else object

# The underscore keeps it out of `push_to_hub` of the adapter.
MERGED_DIR = "_merged"  # the full model with the server's adapter merged into it


class PublishingMixin(_Parent):
    """The part of [`FederatedMixin`] that faces the Hub."""

    owner: Any
    server: Any
    guard: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the server's adapter: what the live model holds is a client's view of it."""
        if self.is_world_process_zero():
            store = RoundStore(output_dir or self.args.output_dir)
            adapter = self.guard.initial if self.server is None else self.server.adapter
            store.output_dir.mkdir(parents=True, exist_ok=True)
            store.publish(adapter, self.guard.peft_config)

    def push_to_hub(
        self, commit_message: str | None = None, blocking: bool = True, token: str | None = None, **kwargs: Any
    ) -> Any:
        """Push the server's adapter with its model card to `args.hub_model_id`, and nothing else of `output_dir`.

        It becomes private unless `private` or `args.hub_private_repo` is False; `kwargs` are those of [`push_adapter`].

        Raises:
            ValueError: if the repository would be public without `allow_public`, or `blocking` is False.
        """
        if not blocking:
            raise ValueError("blocking=False: the push is checked as it goes; it can't go on in the background.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push_adapter(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).name,
            source=self.args.full_model or None,
            commit_message=commit_message or "Adapter of a federation",
            token=token or self.args.hub_token,
            **self._hub_options(kwargs),
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
        self.owner.merge(self.args.output_dir, merged)
        return self.owner.push_merged(
            merged, repo_id, federation_dir=str(self.args.output_dir), **self._hub_options(kwargs)
        )

    def _hub_options(self, options: dict[str, Any]) -> dict[str, Any]:
        private = self.args.hub_private_repo if options.get("private") is None else options["private"]
        return options | {
            "private": private is None or bool(private),
            "revision": options.get("revision") or self.args.hub_revision,
        }
