"""Speed, memory and resistance to kills, measured against the original's algorithm."""
