"""A teacher becomes a space of architectures, and an architecture a student."""
