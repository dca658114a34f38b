"""Tasks: what a benchmark or challenge asks for, one file each.

A task says which recordings, windows and target it means and how it scores; the rooms below do the
work. The next edition of a challenge, or another one, is one more file.
"""
