# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Attackers with what clients have, and their share of the owner's gain."""
