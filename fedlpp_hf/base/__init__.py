# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quantized base Q(W): read the full model W, export a base, check it, load it."""
