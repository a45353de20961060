"""Names and formats of other Dreamer code."""
