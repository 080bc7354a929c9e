"""Statistics of rows, coherence of texts, and the uncertainty of results."""
