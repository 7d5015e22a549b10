"""Gymnasium's eleven v5 tasks."""
