# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Arithmetic and bytes that know nothing of a federation: codebooks, quantized blocks, adapters as dictionaries, files."""
