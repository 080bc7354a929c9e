"""Statistics of rows, coherence of texts, and correction for several tests."""
