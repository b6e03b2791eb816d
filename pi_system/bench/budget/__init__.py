"""A model held to limits that are written down."""
