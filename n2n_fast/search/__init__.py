"""The two stages of REINFORCE, and all that they need."""
