# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a run shows: tables, lines, pictures, and what a directory holds."""
