"""The small model that is served by default, and the programs that made it."""
