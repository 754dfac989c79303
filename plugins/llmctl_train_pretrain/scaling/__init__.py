"""Scaling laws: fit loss to size and tokens, and plan a training from a budget. numpy alone, no torch and no scipy."""
