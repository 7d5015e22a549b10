"""An independent re-run of what the claims' tables say."""
