"""What a dictionary recovers of its own codes: theorem 1 with the dictionary in the place of W_p.

Not to be confused with the recovery of known features, which needs planted data:
``llm_wsae.planting.recovery`` and ``llm_wsae.theory.recovery``.
"""
