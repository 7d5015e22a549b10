"""SubPO on coverage tasks (docs/subpo.md)."""
