"""Where a stage runs: a process of its own on this machine, which reads a request and commits by itself."""
