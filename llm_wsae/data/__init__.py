"""Text, packed contexts and the activation store."""
