"""How the second bundled model, which writes a package's synopsis from its description, was made.

`corpus` reads the pairs out of Debian's package lists, `train` trains, `card` measures and writes
the card.
"""
