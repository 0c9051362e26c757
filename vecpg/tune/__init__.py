"""Settings searched for with Optuna: drawn at once, trained together, halved after each round.

`settings` says how to search, `space` what; `study` keeps it, `rounds` does it, `report` says what
was found.
"""
