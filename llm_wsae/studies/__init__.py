"""Studies: do weights help? Arms, controls and the plain k-curve over seeds, and a verdict."""
