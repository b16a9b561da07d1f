# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Mechanisms that bound what an update can tell. Pure functions where they can be."""
