"""Gradients with a posterior against Monte-Carlo gradients."""
