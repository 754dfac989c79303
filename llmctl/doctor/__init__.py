"""What is wrong with an installation and its machine, each with the command that mends it."""
