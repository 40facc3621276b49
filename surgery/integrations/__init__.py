"""What training loops of others are given, so that nothing is written by hand.

Each file is of one library, and needs it where it is used: `import surgery` imports none of them.
"""
