"""What an answer is worth by rule: reward functions that come with the package."""
