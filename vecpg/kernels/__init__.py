"""What every kernel on the CPU is made with. Nothing else of vecpg is imported here."""
