"""How fast it is: on which device, with how many environments, and how far from the limit.

`cells` says what is measured, `measure` measures it, `results` keeps it, `report` shows it, and
`compare` sets one commit beside another.
"""
