"""How the model is made that writes a package's synopsis from its description.

`corpus` reads the pairs out of Debian's package lists, `train` trains, from the first values of
`copying` and at last by `reward`, `baselines` are what a synopsis is worth without a network,
`card` measures and `page` writes the card.
"""
