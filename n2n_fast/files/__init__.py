"""Reading and writing what anyone may have made; at the ground, for all."""
