"""What `counted.py` reads in compiled kernels, and what it makes of that."""
