"""Generation: text token by token, with a thought before each token."""
