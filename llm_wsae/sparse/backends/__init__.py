"""Implementations of the sparse operations."""
