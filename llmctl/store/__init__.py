"""What exists: artifacts by content id, committed atomically, found again by action key."""
