"""Offline agents: they learn from a data set; an environment gives the spaces and evaluates. Imported on demand."""
