"""Many runs of a script: studies in YAML, and the sweep that makes their runs."""
