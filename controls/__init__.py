"""Evaluation that asks what the zooms are good for: `eval.py --clips .. --zoom .. --votes ..`.

    modes     the flags: which ways a question is played
    altered   environments with other clips, or in which the first answer needs a zoom before it
    effects   right with the clips shown and with others: what the clips did to each question
    votes     the majority of several samples, and a gate that zooms where they disagree
    places    where zooms go against where the evidence is

The method knows nothing of these; eval.py calls them.
"""
