"""This machine and its processes: what a load asks of them, and what it pauses."""
