"""Studies: many runs of a script, and what they come to."""
