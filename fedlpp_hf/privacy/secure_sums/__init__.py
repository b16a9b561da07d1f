# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Secure sums: the server learns the sum of a round's updates, and nothing else (Bonawitz et al., CCS 2017)."""
