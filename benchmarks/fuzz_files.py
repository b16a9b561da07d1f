# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Damaged and made-up files for their readers: bases, packed bases, rounds, adapters, checkpoints, keys, certificates.

A file that has a digest is refused, or says what it said before. One that has none may say something else; but it is refused
by a ValueError or OSError with a message, or read, and never by an exception of a parser.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from benchmarks.fuzz_messages import mutate_bytes, mutate_json
from fedlpp_hf.base.contents import check_configurations
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.base.manifest import check_base
from fedlpp_hf.base.mark_keys import MarkKey
from fedlpp_hf.base.packing import pack_base, read_packed_manifest, unpack_base
from fedlpp_hf.base.shards import read_shards
from fedlpp_hf.base.suspect import SuspectReader
from fedlpp_hf.client.memory import ClientMemory
from fedlpp_hf.flower.certificates import check_authority, make_certificates, make_node_key
from fedlpp_hf.flower.client_keys import read_public_key
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.server.store import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.tensors.lora import lora_factors
from fedlpp_hf.wire.messages import ClientTask, LocalOptions
from tests.helpers import build_model, make_llama_adapter, make_pair


Read = Callable[[Path], Any]
# Texts in the place of a value of JSON, which a library that writes JSON would not write.
TOKENS = [
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5000,
    "1e999",
    "-1e999",
    "NaN",
    '"\\ud800"',
    '"\\u0000"',
    '"' + "x" * 10**6 + '"',
    "",
    "{",
    "]",
]


@dataclass(frozen=True)
class Target:
    """Files of one kind.

    Args:
        files: That are mutated, one at a time, relative to the directory.
        read: Reads them, and returns what they say.
        digests: Whether a file that says something else must be refused.
    """

    files: list[str]
    read: Read
    digests: bool = True


def make_targets(root: Path) -> dict[str, tuple[Path, Target]]:
    """Write one of each, and return where, with its reader. They are read once, to know what they say."""
    build_model("llama").save_pretrained(root / "full", max_shard_size="20KB")
    export_base(root / "full", root / "base" / "b", bits=3, max_shard_size=20_000, model_class=AutoModelForCausalLM)
    (root / "packed").mkdir()
    pack_base(root / "base" / "b", root / "packed" / "base.packed")
    pair = root / "merge"
    make_pair(pair)
    adapter = make_llama_adapter(root / "full", root / "adapter", 0)
    store = RoundStore(root / "rounds")
    store.create({"federation_id": "f0", "clients": {"a": 3}, "config": {"num_rounds": 2}})
    tensors = read_adapter(adapter)[0]
    for number in range(2):
        store.commit(
            number, tensors, LoraConfig(r=4, target_modules=["q_proj"]), tensors, {"round": number, "metrics": {}}
        )
    MarkKey("ab" * 32, str(root / "full"), {"bits": 3}, ["a"]).write(root / "marks" / "key.json")
    make_certificates(root / "certificates", ["localhost"])
    make_node_key(root / "certificates")
    ClientSettings("c.yaml", "d.jsonl", "a", str(root / "settings"), "cache").write()
    _remember(root / "memory").write(tensors)
    rounds = "_federation/rounds/round-00001/"
    names = ("adapter_model.safetensors", "adapter_config.json", "server_state.safetensors", "round.json")
    return {
        "manifest": (root / "base", Target(["b/base_manifest.json"], read_base)),
        "base": (root / "base", Target(["b/config.json", "b/model.safetensors.index.json", _first(root / "base", "b/")], read_base)),
        "base, unverified": (root / "base", Target(["b/config.json", "b/model.safetensors.index.json", _first(root / "base", "b/")], read_unverified, False)),
        "packed base": (root / "packed", Target(["base.packed"], unpack)),
        "round": (root / "rounds", Target([rounds + name for name in names], read_round)),
        "federation": (root / "rounds", Target(["_federation/federation.json"], read_round)),
        "adapter": (root / "adapter", Target(["adapter_config.json", "adapter_model.safetensors"], read_any_adapter, False)),
        "adapter to merge": (pair, Target(["adapter/adapter_config.json", "adapter/adapter_model.safetensors"], merge, False)),
        "checkpoint": (root / "full", Target(["model.safetensors.index.json", _first(root / "full", ""), "config.json"], read_full, False)),
        "suspect": (root / "full", Target(["model.safetensors.index.json", _first(root / "full", "")], read_suspect, False)),
        "mark key": (root / "marks", Target(["key.json"], read_marks, False)),
        "certificates": (root / "certificates", Target(["ca.crt", "ca.key", "server.crt", "server.key"], certify, False)),
        "client's ca.crt": (root / "certificates", Target(["ca.crt"], lambda d: check_authority(d / "ca.crt"), False)),
        "node's key": (root / "certificates", Target(["node.key", "node.pub"], read_node, False)),
        "client's settings": (root / "settings", Target(["client.json"], lambda d: vars_of(ClientSettings.read(d / "client.json")), False)),
        "client's memory": (root / "memory", Target([_first(root / "memory", "")], lambda d: sorted(_remember(d, 2).read()), False)),
    }  # fmt: skip


def _first(directory: Path, prefix: str) -> str:
    return min(str(path.relative_to(directory)) for path in (directory / prefix).rglob("*.safetensors"))


def _remember(directory: Path, number: int = 1) -> ClientMemory:
    return ClientMemory(directory, ClientTask("f", number, 2, "a", 0, "ab" * 32, None, LocalOptions()))


# --- Readers, as the library calls them.
def read_base(directory: Path) -> Any:
    manifest = check_base(directory / "b")
    check_configurations(directory / "b", manifest)
    return manifest


def read_unverified(directory: Path) -> Any:
    return sorted(read_shards(directory / "b"))


def unpack(directory: Path) -> Any:
    read_packed_manifest(directory / "base.packed")
    return unpack_base(directory / "base.packed", directory / "unpacked", overwrite=True)


def read_round(directory: Path) -> Any:
    store = RoundStore(directory)
    adapter, state = store.load(1)
    return store.read(), store.records(), sorted(adapter), sorted(state)


def read_any_adapter(directory: Path) -> Any:
    tensors, config = read_adapter(directory)
    return sorted(lora_factors(tensors, config))


def merge(directory: Path) -> Any:
    shutil.rmtree(directory / "out", ignore_errors=True)
    return len(
        merge_adapter(directory / "full", directory / "adapter", directory / "out", sync=False, threads=1).layers
    )


def read_full(directory: Path) -> Any:
    source = FullModel(directory)
    source.read_config()
    return {name: source.read(name).shape for name in source.shapes}


def read_suspect(directory: Path) -> Any:
    reader = SuspectReader(directory)
    shapes = {"model.embed_tokens.weight": (96, 48), "model.layers.0.mlp.up_proj.weight": (80, 48)}
    return [reader.read(name, shape).shape for name, shape in shapes.items() if reader.has(name, shape)]


def read_marks(directory: Path) -> Any:
    key = MarkKey.read(directory / "key.json")
    return [key.mark_for(client) for client in key.clients]


def certify(directory: Path) -> Any:
    """They are mended, or refused; what is there afterwards fits together."""
    make_certificates(directory, ["localhost"])
    authority, server = (
        x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes()) for name in ("ca", "server")
    )
    server.verify_directly_issued_by(authority)


def read_node(directory: Path) -> Any:
    read_public_key(directory / "node.pub")
    make_node_key(directory)


def vars_of(settings: ClientSettings) -> Any:
    return settings.client_id, settings.key_file, settings.flags


# --- Mutations.
def mutate_file(name: str, data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The kind of a mutation, and the file with it."""
    if chance.random() < 0.35 or not name.endswith((".json", ".safetensors", ".packed")):
        kind, changed = mutate_bytes(data, data[::-1], chance)
        return f"bytes: {kind}", changed
    if name.endswith(".json"):
        return _mutate_text(data, chance)
    size = struct.unpack("<Q", data[:8])[0]
    kind, header = _mutate_text(data[8 : 8 + size], chance)
    length = chance.choice((len(header), len(header), len(header), 0, 2**63, len(header) + 8, 10**8 + 1))
    return f"header, {kind}", struct.pack("<Q", length) + header + data[8 + size :]


def _mutate_text(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    value = json.loads(data)
    if chance.random() < 0.7:
        return "value", json.dumps(mutate_json(value, chance)).encode()
    mark = "%% here %%"
    text = json.dumps(_put(value, mark, chance)).replace(json.dumps(mark), chance.choice(TOKENS))
    return "token", text.encode("utf-8", "surrogatepass")


def _put(value: Any, mark: Any, chance: random.Random) -> Any:
    """`value` with `mark` in the place of something in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        return value | {key: _put(value[key], mark, chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], _put(value[place], mark, chance), *value[place + 1 :]]
    return mark


class FileFuzz:
    """One kind of files: mutates and reads them, and knows what they said.

    Args:
        directory: Of the files; a copy is made of it.
        target: What is in it.
        place: For the copy.
    """

    def __init__(self, directory: Path, target: Target, place: Path):
        self.target, self.place = target, place
        shutil.copytree(directory, place, dirs_exist_ok=False)
        self.original = {name: (place / name).read_bytes() for name in target.files}
        self.others = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        self._stamps = {path: _stamp(path) for path in self.others}
        self.said = repr(target.read(place))
        self.restore()

    def restore(self) -> None:
        """Put back what a reader, or the one before it, has changed."""
        for path, data in self.others.items():
            if not path.is_file() or _stamp(path) != self._stamps[path]:
                mode = path.stat().st_mode if path.exists() else None
                path.write_bytes(data)
                if mode is not None:
                    os.chmod(path, mode)
                self._stamps[path] = _stamp(path)

    def try_one(self, chance: random.Random) -> tuple[str, str]:
        """The kind of a mutation, and `refused`, `equal` or `read`.

        Raises:
            RuntimeError: if a file with a digest is taken though it says something else.
        """
        name = chance.choice(self.target.files)
        kind, changed = mutate_file(name, self.original[name], chance)
        path = self.place / name
        mode = path.stat().st_mode & 0o777
        path.write_bytes(changed)
        os.chmod(path, mode)
        try:
            said = repr(self.target.read(self.place))
        except (ValueError, OSError) as error:
            if (
                type(error) is not ValueError
                and not isinstance(error, OSError)
                and not type(error).__module__.startswith("fedlpp")
            ):
                raise RuntimeError(f"{name}: an exception of a parser: {type(error).__name__}: {error}") from error
            if not str(error).strip():
                raise RuntimeError(f"{name}: {type(error).__name__} without a message") from error
            return kind, "refused"
        finally:
            self.restore()
        if said == self.said:
            return kind, "equal"
        if self.target.digests:
            raise RuntimeError(f"{name} was taken though it says something else")
        return kind, "read"


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
