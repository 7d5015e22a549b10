"""HDPO on inventory networks, measured."""
