# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The only round loop, its state, what it admits and what it commits. It has no way to a model."""
