"""How good an answer is: verifiers, their scores, and rewards that are made of several."""
