"""The laboratory: studies of weights, planted features, the theory.

It may import everything; only the command line opens it.
"""
