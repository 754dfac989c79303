"""What the user asked for: YAML with positions, merged, interpolated, validated."""
