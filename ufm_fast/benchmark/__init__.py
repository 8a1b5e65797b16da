"""`ufm-fast bench`: the claims of the README, measured on the user's machine, beside torch's own
ways.

One way of measuring (`measuring`), one list of rivals (`rivals`), and a function a claim
(`claims`); the scripts of bench/, which measure more and longer, use the first two.
"""
