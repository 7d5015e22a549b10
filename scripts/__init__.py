"""The command line. Tests and other scripts import it from the root of the tree; nothing else does."""
