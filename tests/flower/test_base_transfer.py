# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The base in pieces, and a client's own copy of it."""

from pathlib import Path

import pytest

from fedlpp_hf.flower.base_transfer import PackedBase, count_received, find_base, read_fingerprint, receive_piece
from tests.helpers import FINGERPRINT


class TestBaseInPieces:
    def receive_all(self, packed, cache, step=10_000, until=None):
        have = count_received(cache, packed.fingerprint)
        while have < (until or packed.size):
            have = receive_piece(cache, packed.fingerprint, **packed.read(have, step))
        return have

    @pytest.fixture
    def packed(self, llama_base, tmp_path):
        return PackedBase.pack(llama_base, tmp_path / "base.packed")

    def test_arrives_as_it_was(self, packed, llama_base, tmp_path):
        assert find_base(tmp_path / "cache", packed.fingerprint) is None
        self.receive_all(packed, tmp_path / "cache")
        base = find_base(tmp_path / "cache", packed.fingerprint)
        assert {file.name for file in base.iterdir()} == {file.name for file in llama_base.iterdir()}
        assert all((base / file.name).read_bytes() == file.read_bytes() for file in llama_base.iterdir())

    def test_resumes_where_it_broke_off(self, packed, tmp_path):
        self.receive_all(packed, tmp_path, until=20_000)
        assert count_received(tmp_path, packed.fingerprint) == 20_000
        assert receive_piece(tmp_path, packed.fingerprint, **packed.read(0, 100)) == 20_000  # a repeated piece
        self.receive_all(packed, tmp_path)
        assert find_base(tmp_path, packed.fingerprint)

    def test_damaged_piece_is_not_kept(self, packed, tmp_path):
        piece = packed.read(0, 1000)
        with pytest.raises(ValueError, match="damaged"):
            receive_piece(tmp_path, packed.fingerprint, **(piece | {"data": b"x" * 1000}))
        assert count_received(tmp_path, packed.fingerprint) == 0

    def test_another_base_is_refused(self, packed, tmp_path):
        with pytest.raises(ValueError, match="instead of aaaaaaaaaaaa"):
            receive_piece(tmp_path, FINGERPRINT, **packed.read(0, packed.size))
        assert count_received(tmp_path, FINGERPRINT) == 0

    def test_fingerprint_is_no_path(self, tmp_path):
        with pytest.raises(ValueError, match="not a fingerprint"):
            receive_piece(tmp_path, "../" + "a" * 61, offset=0, size=1, sha256="", data=b"")

    def test_own_base_from_a_private_repository(self, llama_base, tmp_path, hub, monkeypatch):
        files = {file.name: file.read_bytes() for file in Path(llama_base).iterdir()}
        hub.add_repo("owner/base", files)
        fingerprint = read_fingerprint(llama_base)
        monkeypatch.setenv("HF_TOKEN", "reader")  # the client's own: it can't write
        path = find_base(tmp_path / "bases", fingerprint, "owner/base")
        assert {file.name: file.read_bytes() for file in path.iterdir() if file.name in files} == files
        with pytest.raises(ValueError, match="the federation's is aaaaaaaaaaaa"):
            find_base(tmp_path / "bases", FINGERPRINT, "owner/base")
        monkeypatch.setenv("HF_TOKEN", "nobody")
        hub.add_repo("owner/other", files)
        with pytest.raises(OSError, match="owner/other"):
            find_base(tmp_path / "bases", fingerprint, "owner/other")

    def test_own_base_must_be_the_federations(self, llama_base, tmp_path):
        fingerprint = read_fingerprint(llama_base)
        assert find_base(tmp_path, fingerprint, str(llama_base)) == Path(llama_base)
        with pytest.raises(ValueError, match="the federation's is aaaaaaaaaaaa"):
            find_base(tmp_path, FINGERPRINT, str(llama_base))
