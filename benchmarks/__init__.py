"""Every figure that the documentation claims, one command each. README.md records the results."""
