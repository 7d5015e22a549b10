"""The central claim of each paper, tested: settings tuned on other seeds, equal budgets, paired differences."""
