"""Counts and scores."""
