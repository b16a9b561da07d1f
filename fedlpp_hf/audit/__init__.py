# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Attackers that have what clients have, and the share of the owner's gain that they get."""
