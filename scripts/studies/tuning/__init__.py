"""What a search of settings is worth on fresh seeds."""
