"""Sweeps over learning rates and seeds, and reports of them: the paper's tables and figures."""
