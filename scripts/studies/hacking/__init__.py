"""ORPO against reward hacking (docs/orpo.md)."""
