"""What to do next: plan, gates, run, report."""
