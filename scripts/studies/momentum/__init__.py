"""The momentum and Hessian methods side by side."""
