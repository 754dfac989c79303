"""Shell completion: what may come next on a command line, for bash, zsh and fish."""
