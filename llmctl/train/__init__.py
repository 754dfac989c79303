"""How the model learns: one loop, many objectives."""
