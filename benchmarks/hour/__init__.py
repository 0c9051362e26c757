"""The parts of `first_hour.py`, each run in a process of its own."""
