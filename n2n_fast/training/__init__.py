"""A teacher, data, and one student's training."""
