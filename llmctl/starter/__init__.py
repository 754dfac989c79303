"""The first spec of a user: a goal, their data and model, and a commented file that runs."""
