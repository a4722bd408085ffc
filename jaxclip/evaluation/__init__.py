"""Protocols, evaluator, comparison and report."""
