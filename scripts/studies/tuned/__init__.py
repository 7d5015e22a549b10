"""The tuned settings of the package, run."""
