"""Text out: one token after another, with a thought before each."""
