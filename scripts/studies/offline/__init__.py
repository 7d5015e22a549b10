"""Offline agents side by side."""
