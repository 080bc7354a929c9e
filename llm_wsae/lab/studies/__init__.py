"""Studies: do weights help? Rules, controls and plain dictionaries over seeds, and verdicts."""
