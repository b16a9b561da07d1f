# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Every option of a federation, in groups, and where they are read from: Python, YAML, flags."""
