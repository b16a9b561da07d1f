# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A marked copy of the base for each client: made once, sent to one, and found again."""

import pytest
from transformers import LlamaForCausalLM

from fedlpp_hf import export_base
from fedlpp_hf.base.mark_keys import MarkKey, prepare_mark
from fedlpp_hf.base.marking import trace_base
from fedlpp_hf.flower.base_copies import MarkedCopies
from fedlpp_hf.flower.base_transfer import find_base, read_fingerprint, receive_piece


class Owner:
    """The owner's process, in this one."""

    def __init__(self, full_model):
        self.full_model, self.exported = full_model, []

    def export_base(self, output_dir, mark):
        key_file, holder = mark
        self.exported.append(holder)
        settings = {"bits": 4, "block_size": 64, "skip_modules": None, "model_class": None}
        mark = prepare_mark(key_file, holder, self.full_model, settings)
        export_base(self.full_model, output_dir, mark=mark)


@pytest.fixture
def make_copies(wide_llama, tmp_path):
    """A function that makes a server's copies, as each start does, and the owner that is asked for them."""
    export_base(wide_llama, tmp_path / "base")
    fingerprint = read_fingerprint(tmp_path / "base")

    def make():
        owner = Owner(wide_llama)
        return MarkedCopies(tmp_path / "copies", owner, tmp_path / "key.json", fingerprint), owner

    return make


def take(packed, cache, step=100_000, **changes):
    received = 0
    while received < packed.size:
        piece = packed.read(received, step) | {"copy": packed.copy} | changes
        received = receive_piece(cache, packed.fingerprint, **piece)


def test_each_client_gets_its_own_and_is_traced_by_it(make_copies, tmp_path):
    copies, owner = make_copies()
    one, two = copies.find("a"), copies.find("b + c")
    assert one.fingerprint == two.fingerprint and one.copy != two.copy
    assert copies.find("a") is one and owner.exported == ["a", "b + c"]
    assert (
        sorted(path.suffix for path in (tmp_path / "copies").iterdir()) == [".packed"] * 2
    )  # no unpacked one is left
    for copy in (one, two):  # two clients of one machine, with one cache
        take(copy, tmp_path / "cache")
    key = MarkKey.read(tmp_path / "key.json")
    assert key.clients == ["a", "b + c"]
    for copy, holder in ((one, "a"), (two, "b + c")):
        found = trace_base(find_base(tmp_path / "cache", copy.fingerprint, copy=copy.copy), key)
        assert [trace.client for trace in found if trace.false_alarm < 1e-6] == [holder]
    assert find_base(tmp_path / "cache", one.fingerprint) is None  # the unmarked base was never sent
    assert not [trace for trace in trace_base(tmp_path / "base", key) if trace.false_alarm < 1e-6]


def test_resumed_server_finds_them_again(make_copies, tmp_path):
    first = make_copies()[0].find("a")
    data = first.file.read_bytes()
    copies, owner = make_copies()
    copies.forget_others(["a"])
    assert copies.find("a") == first and not owner.exported
    first.file.unlink()  # made again, it is the same
    assert make_copies()[0].find("a") == first and first.file.read_bytes() == data
    # Another secret makes other copies; those of nobody are deleted.
    (tmp_path / "key.json").unlink()
    copies, owner = make_copies()
    other = copies.find("a")
    assert other.fingerprint == first.fingerprint and other.copy != first.copy
    copies.forget_others(["a"])
    assert list((tmp_path / "copies").iterdir()) == [other.file]


def test_another_clients_copy_is_refused(make_copies, tmp_path):
    copies, _ = make_copies()
    one, two = copies.find("a"), copies.find("b")
    with pytest.raises(ValueError, match="another copy of the base than it had announced"):
        take(one, tmp_path / "cache", copy=two.copy)
    assert find_base(tmp_path / "cache", two.fingerprint, copy=two.copy) is None
    take(one, tmp_path / "cache")
    own = find_base(tmp_path / "cache", one.fingerprint, copy=one.copy)
    assert find_base("unused", one.fingerprint, str(own), one.copy) == own  # as `--base`
    with pytest.raises(ValueError, match="not the copy that the owner marked for this client"):
        find_base("unused", two.fingerprint, str(own), two.copy)


def test_damaged_file_and_one_of_another_base_are_refused(make_copies, wide_llama, tmp_path):
    copies, _ = make_copies()
    file = copies.find("a").file
    data = file.read_bytes()
    file.write_bytes(data[:1000])
    with pytest.raises(ValueError, match="not a packed base, or it is damaged"):
        make_copies()[0].find("a")
    file.write_bytes(data)
    copies = make_copies()[0]
    copies.owner.export_base = lambda output_dir, mark: export_base(wide_llama, output_dir, bits=3)
    with pytest.raises(ValueError, match="the federation's is"):
        copies.find("b")


def test_full_model_that_moved_needs_its_key(make_copies, wide_llama, tmp_path):
    copies, owner = make_copies()
    copies.find("a")
    LlamaForCausalLM.from_pretrained(wide_llama).save_pretrained(tmp_path / "moved")
    owner.full_model = tmp_path / "moved"
    with pytest.raises(ValueError, match="is for copies of"):
        copies.find("b")
    assert not (tmp_path / "copies" / "export").exists()
