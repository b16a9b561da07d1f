# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From a round's updates to the server's next adapter. Pure functions of tensors: one file a rule."""
