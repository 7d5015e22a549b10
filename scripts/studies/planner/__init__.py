"""The planner's case: learnt orders against rules that are tuned per product, on held-out weeks."""
